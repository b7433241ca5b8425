"""Performance: every method on every task, beside the scores that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from deltatune.study.cell import Arm
from deltatune.study.claim import Claim, Found, everywhere
from deltatune.study.experiment import Experiment, Summaries
from deltatune.study.experiments.over_tasks import (
    differences,
    from_highest,
    in_order,
    in_points,
    mean,
    named,
    only_name,
    over_tasks,
    ranks,
)
from deltatune.study.experiments.step_memory import MEMORY, NOTE, peaks, scatter, with_memory
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.summary import Summary
from deltatune.tasks.reference import table1

__all__ = ["EXPERIMENT", "PRINTED", "paper_averages"]

# Our method -> the column of Table 1 that has it, on T5-base.
PRINTED = {"prompt": "pt_base", "prefix": "pf", "lora": "lr", "adapter": "ap", "full": "ft"}


def paper_averages(column: str) -> dict[str, float]:
    """The averages of a column of Table 1 as its own task rows give them, by category and overall.

    Percentages; categories as `table1.csv` names them, "overall" for all tasks. A task without a
    printed score counts in none.
    """
    by_category: dict[str, list[float]] = {}
    for row in table1():
        if row["kind"] == "task" and row[column]:
            by_category.setdefault(row["category"], []).append(float(row[column]))
    averages = {category: fmean(found) for category, found in by_category.items()}
    return {**averages, "overall": fmean(s for found in by_category.values() for s in found)}


def _sections(summaries: Summaries) -> list[Section]:
    found = []
    for name, summary in summaries.items():
        for backbone in summary.comparison.backbones if name != MEMORY else ():
            where = " ".join(filter(None, (backbone, name)))
            found += _of_backbone(summary, summary.arms(backbone), where)
            found += _memory(summary, peaks(summaries, backbone), where)
    return found


def _memory(summary: Summary, memory: Mapping[Arm, float], where: str) -> list[Section]:
    if not memory:
        return []
    scores = over_tasks(summary, list(memory))
    columns = (Column("method"), Column("peak memory, MiB", "count"), Column("score", "score"))
    rows = tuple((str(arm), peak, mean(scores[str(arm)])) for arm, peak in memory.items())
    table = Table("Memory of a step", columns, rows, note=NOTE, best_of="column")
    return [Section(f"{where}: memory", parts=(table, *scatter(memory, scores)))]


def _of_backbone(summary: Summary, arms: Sequence[Arm], where: str) -> list[Section]:
    sections = []
    beside = _beside_the_paper(summary, arms)
    if beside is not None:
        sections.append(
            Section(
                f"{where} beside the paper",
                "Table 1",
                ("The paper's scores are of T5-base, 248 million parameters, on the same task.",),
                (beside,),
            )
        )
    scores = over_tasks(summary, arms)
    if len(arms) > 1 and any(scores.values()):
        tested = (differences("Two by two", scores), ranks("Mean ranks over tasks", scores))
        sections.append(Section(f"{where}: which is better", "", (), tested))
    return sections


def _beside_the_paper(summary: Summary, arms: Sequence[Arm]) -> Table | None:
    """Ours and the paper's, for the arms and tasks that both have."""
    columns = {arm: PRINTED[n] for arm in arms if (n := only_name(arm)) in PRINTED}
    printed = {row["task_id"]: row for row in table1() if row["kind"] == "task"}
    tasks = [task for task in summary.comparison.tasks if task in printed]
    if not columns or not tasks:
        return None

    def line(name: str, task: str) -> tuple[Value, ...]:
        row: list[Value] = [name]
        for arm, column in columns.items():
            theirs = printed[task][column]
            row += [summary.spread(arm, task), float(theirs) / 100 if theirs else None]
        return tuple(row)

    rows = [line(task, task) for task in tasks]
    means = [_mean(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    missing = [task for task in summary.unavailable if task in printed]
    rows += [line(f"{task} (unavailable)", task) for task in missing]
    rows.append((f"Average of {len(tasks)}", *means))
    heads = [
        Column(title, "score")
        for arm in columns
        for title in (str(arm), f"{only_name(arm)}: paper")
    ]
    return Table(
        "Scores",
        (Column("task"), *heads),
        tuple(rows),
        averages=frozenset({len(rows) - 1}),
        note="An average stands only where every task has a score.",
        best_of="nothing",
    )


def _mean(values: Sequence[Value]) -> Value:
    found = [v if isinstance(v, float) else v.mean for v in values if v and not isinstance(v, str)]
    return fmean(found) if len(found) == len(values) else None


def _scores(summary: Summary, backbone: str) -> dict[str, list[float]]:
    """Method of the paper -> its score on each task that all have; empty without tasks."""
    arms = named(summary, backbone, *PRINTED)
    found = over_tasks(summary, list(arms.values()))
    return {name: scores for name, arm in arms.items() if (scores := found[str(arm)])}


def _comparable(summary: Summary, backbone: str) -> Found | None:
    scores = _scores(summary, backbone)
    full = scores.get("full")
    near = [name for name in ("lora", "adapter", "prefix") if name in scores]
    if full is None or not near:
        return None
    allowed = paper_averages("ft")["overall"] - paper_averages("pf")["overall"]
    apart = {name: [a - b for a, b in zip(scores[name], full, strict=True)] for name in near}
    said = ", ".join(f"{name} {in_points(values)}" for name, values in apart.items())
    here = f"Points from full tuning: {said}. In the paper they are up to {allowed:.1f} below."
    return Found(here, all(100 * fmean(values) >= -allowed for values in apart.values()))


def _ranked(summary: Summary, backbone: str) -> Found | None:
    means = {name: fmean(scores) for name, scores in _scores(summary, backbone).items()}
    printed = ("full", "lora", "adapter", "prefix", "prompt")
    if set(means) != set(printed):
        return None
    return Found(f"{in_order(means)}.", from_highest(means) == [*printed])


def _size_is_not_all(summary: Summary, backbone: str) -> Found | None:
    scores = {name: s for name, s in _scores(summary, backbone).items() if name != "full"}
    if len(scores) < 3:
        return None
    arms = named(summary, backbone)
    size = {name: summary.mean(arms[name], lambda r: r.ratio) or 0.0 for name in scores}
    largest, best = max(size, key=size.__getitem__), max(scores, key=lambda n: fmean(scores[n]))
    place = 1 + sum(fmean(one) > fmean(scores[largest]) for one in scores.values())
    here = (
        f"{largest} tunes most of the deltas ({size[largest]:.2%}) and is number {place} of "
        f"{len(scores)}; the best is {best} ({size[best]:.2%})."
    )
    return Found(here, place > 1)


def _prompt_lags(summary: Summary, backbone: str) -> Found | None:
    scores = {name: s for name, s in _scores(summary, backbone).items() if name != "full"}
    if "prompt" not in scores or len(scores) < 3:
        return None
    by_task = zip(*(found for name, found in scores.items() if name != "prompt"), strict=True)
    least, best = zip(*((min(others), max(others)) for others in by_task), strict=True)
    last = sum(own < other for own, other in zip(scores["prompt"], least, strict=True))
    behind = fmean(best) - fmean(scores["prompt"])
    here = (
        f"The last of the deltas on {last} of {len(least)} tasks; {100 * behind:.1f} points below "
        "the best of them on average."
    )
    return Found(here, last > len(least) / 2)


EXPERIMENT = Experiment(
    name="performance",
    shows="every method on every task, beside the paper's scores",
    paper="Table 1",
    sections=_sections,
    parts=with_memory,
    defaults={"methods": ("prompt", "prefix", "lora", "adapter", "bitfit", "full"), "seeds": 3},
    claims=(
        Claim(
            "Delta-tuning is almost comparable to fine-tuning in most cases.",
            everywhere(_comparable, but=MEMORY),
        ),
        Claim("By average FT > LR > AP > PF > PT.", everywhere(_ranked, but=MEMORY)),
        Claim(
            "More tunable parameters do not necessarily lead to better performance.",
            everywhere(_size_is_not_all, but=MEMORY),
        ),
        Claim(
            "Prompt tuning lags far behind the other deltas in most cases.",
            everywhere(_prompt_lags, but=MEMORY),
        ),
    ),
)
