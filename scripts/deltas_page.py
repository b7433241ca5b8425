"""Writes docs/results/deltas.md from the study of benchmarks/deltas.yaml.

    python scripts/deltas_page.py runs/deltas --untrained runs/deltas-untrained \\
        --nf4 runs/deltas-nf4 --longer runs/deltas-longer

The second study is the same with `--methods full --budget nothing --seeds 1 --learning-rates x1`:
what the backbone says with a head that was only drawn. The third is the same with
`--methods qlora --set options.quantise=nf4`, the last that of `scripts/deltas_longer.py`. The exit
code is 1 where a method is further than five points below full tuning and REASONS do not say why,
below the untrained model, or has its best rate at an edge.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltatune.study.cell import Arm
from deltatune.study.store import Done, open_study
from deltatune.study.summary import Spread, Summary, summarise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "deltas.md"
POINTS = 0.05  # below full tuning, of the average
BACKBONE = "minilm"
# Why a method stays behind here.
REASONS: Mapping[str, str] = {
    "adapter_drop": "one of the six blocks has adapters (the preset drops five, as of twelve). "
    "More steps bring trec, not the tasks that compare words or sentences.",
    "adapter_fusion": "it attends over frozen adapters that are trained beforehand, on other "
    "tasks; here there are none, and those that it attends over are drawn. It was not trained "
    "longer here.",
    "invertible": "it changes the embeddings alone, below all blocks.",
    "prompt": "it adds tokens to the input alone; it needs more steps.",
    "p_tuning": "as `prompt`, and its tokens come out of a network that is trained with them.",
    "intrinsic_prompt": "as `prompt`, in a subspace that is drawn; its first stage, in which many "
    "tasks find that subspace, is left out here.",
    "selective_module": "it trains what modules the draw gives, 3 % of the backbone, the same for "
    "all tasks; it needs more steps.",
    "diff_pruning": "one rate serves two stages that want rates a hundred times apart, that of "
    "full tuning for the dense difference and that of a mask for the 0.5 % that are kept, which "
    "then have 48 steps left. It was not trained longer here.",
    "trainable_tokens(tokens='0:2000')": "it changes the embeddings of 2,000 tokens alone; it "
    "needs more steps.",
    "bitfit(at='block[1/2:].linear | block[1/2:].norm')": "a seed learns the rule of the "
    "minimal pairs at once or not at all; two of three had not by step 160.",
    "prompt + bitfit + adapter": "a seed learns the rule of the minimal pairs at once or not at "
    "all; with the one rate of all three, two of three had not by step 160.",
}


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--untrained", required=True)
    parser.add_argument("--nf4", required=True)
    parser.add_argument("--longer", required=True)
    given = parser.parse_args()
    studies = (given.study, given.untrained, given.nf4)
    found, plain, rounded = (summarise(open_study(at)) for at in studies)
    tasks = found.comparison.tasks
    averages = {arm: found.average(arm, tasks) for arm in found.arms(BACKBONE)}
    nf4 = {arm: rounded.average(arm, tasks) for arm in rounded.arms(BACKBONE)}
    full, untrained = averages[full_tuning(found)], plain.average(full_tuning(plain), tasks)
    assert full is not None and untrained is not None
    late = behind(averages | nf4, full)
    below = [arm for arm in late if (own := (averages | nf4)[arm]) and own.mean < untrained.mean]
    lines = [
        _head(found, plain, full, untrained),
        *(_row(found, arm, averages[arm], full) for arm in averages),
        *(_row(rounded, arm, nf4[arm], full) for arm in nf4),
        "",
        "The last line is `qlora`, on a base in NF4; all others are on one in fp32. Methods that "
        "only say where a prompt begins (PPT, SPoT) train what `prompt` does.",
        "",
        "## More than five points below full tuning",
        "",
        *(f"- `{a.method}`: {REASONS.get(a.method, '**no reason is known**')}" for a in late),
        "",
        *_longer(found, list(open_study(given.longer).done().values())),
        "",
    ]
    choices = [*found.choices.items(), *rounded.choices.items()]
    edges = [str(group) for group, choice in choices if choice.at_edge]
    lines += [f"Best rates at an edge of their grids: {', '.join(edges) or 'none'}.", ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    return int(bool(edges or below or [arm for arm in late if arm.method not in REASONS]))


def full_tuning(found: Summary) -> Arm:
    """Returns the arm of full tuning."""
    return next(arm for arm in found.arms(BACKBONE) if arm.method == "full")


def behind(averages: Mapping[Arm, Spread | None], full: Spread) -> list[Arm]:
    """Returns the arms whose average is further than five points below that of full tuning."""
    return [a for a, own in averages.items() if own is None or own.mean < full.mean - POINTS]


def _longer(found: Summary, longer: Sequence[Done]) -> list[str]:
    """Returns the table of what was trained longer, beside the study's own scores."""
    scores: dict[tuple[Arm, str], list[float]] = defaultdict(list)
    for done in longer:
        scores[done.cell.arm, done.cell.task].append(done.result.score)
    budgets = ", ".join(sorted({done.cell.budget for done in longer}))
    lines = [
        f"With {budgets} instead of {found.comparison.budget}, at the same rates:",
        "",
        f"| | task | {found.comparison.budget} | {budgets} | full tuning |",
        "|---|---|---:|---:|---:|",
    ]
    full = full_tuning(found)
    for arm in found.arms(BACKBONE):
        for task in found.comparison.tasks:
            if after := scores.get((arm, task)):
                beside = found.spread(arm, task), Spread(tuple(after)), found.spread(full, task)
                method = str(arm.method).replace("|", "\\|")
                lines.append(f"| `{method}` | {task} | {' | '.join(map(_score, beside))} |")
    return lines


def _head(found: Summary, plain: Summary, full: Spread, untrained: Spread) -> str:
    tasks = found.comparison.tasks
    base = [plain.spread(plain.arms(BACKBONE)[0], task) for task in tasks]
    said = ", ".join(
        f"{task} {100 * one.mean:.2f}" for task, one in zip(tasks, base, strict=True) if one
    )
    return "\n".join(
        (
            "# Every delta on MiniLM",
            "",
            f"{len(found.arms(BACKBONE))} arms on {len(tasks)} tasks, {found.comparison.seeds} "
            f"seeds, {found.comparison.budget}; benchmarks/deltas.yaml has the command, the "
            "revision and where the cells are. Test scores times 100, ± the sample standard "
            "deviation over the seeds. One rate for each arm, the best of its grid on the "
            "validation rows of all tasks, seed 0.",
            "",
            f"The untrained model: {said}; average {100 * untrained.mean:.2f}. Full tuning: "
            f"{100 * full.mean:.2f}.",
            "",
            f"| | {' | '.join(tasks)} | average | to full | tunable | rate |",
            "|---|" + "---:|" * (len(tasks) + 4),
        )
    )


def _row(found: Summary, arm: Arm, average: Spread | None, full: Spread) -> str:
    cells = [_score(found.spread(arm, task)) for task in found.comparison.tasks]
    apart = "-" if average is None else f"{100 * (average.mean - full.mean):+.2f}"
    share = found.mean(arm, lambda result: result.trainable / result.base)
    rates = [choice.rate for group, choice in found.choices.items() if group.arm == arm]
    rate = "-" if not rates or rates[0] is None else f"{rates[0]:.4g}"
    tuned = "-" if share is None else f"{share:.3%}"
    method = str(arm.method).replace("|", "\\|")
    return f"| `{method}` | {' | '.join(cells)} | {_score(average)} | {apart} | {tuned} | {rate} |"


def _score(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    apart = "" if spread.deviation is None else f" ±{100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f}{apart}"


if __name__ == "__main__":
    raise SystemExit(main())
