"""Writes docs/results/studies.md from the cells that are kept in benchmarks/studies.

    python scripts/studies_page.py

The exit code is 1 while a study is not finished, has no report in docs/results/studies, or nobody
has said what it shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studies import KEPT, REPORTS, STUDIES, begin

from deltatune.study.claim import held_to
from deltatune.study.experiment import Summaries, studied, summaries
from deltatune.study.experiments import find_experiment
from deltatune.study.facts import NOTHING
from deltatune.study.plain import table_as_markdown
from deltatune.study.section import Column, Table
from deltatune.study.status import Status, status
from deltatune.study.store import open_study
from deltatune.study.summary import Summary

PAGE = REPORTS.with_suffix(".md")
HEAD = """# The paper's experiments, run

Every experiment of the paper and of the review, with models that are at hand: MiniLM (22.7 million
parameters, its classes by a head) and the embedded T5 ladder (2.2, 5.4 and 12.5 million, its label
words ranked). Budgets are those that two cores without a GPU do in hours: 160 to 240 steps of 8
rows, at most 2,000 training rows, 100 validation and 300 test rows, the first 48 tokens of a text.
The paper trains T5-base, ten times as large as MiniLM, for thousands of steps. What is compared is
which way a finding points, not scores.

`DELTATUNE_DATA=... make studies` runs them, and goes on from the cells that are kept in
`benchmarks/studies`, as far as they are of the same code and libraries; the files of settings
beside those say what was run. Learning rates and checkpoints are chosen on validation rows
(protocol `clean`). A report names the tasks on whose texts MiniLM was trained, what was cut, what
is not above the commonest label, and what failed. In the last column is on how many backbones and
settings a finding of the paper is found here.
"""
# What is to be said of a study beside its numbers.
SHOWN: Mapping[str, str] = {
    "efficiency": "Bytes held are as the paper has it: what a delta saves are gradients and "
    "moments, most of what one row takes, and a third of the activations. Savings at the measured "
    "peak, which also has what lives within an operation, are smaller: LoRA peaks at 0.79 of full "
    "tuning with 64 rows on MiniLM. BitFit holds the least, yet LoRA has the lower peak on the "
    "two larger models. That an adapter costs no forward time on the T5s is within what two "
    "processes on one machine do to each other. The cell that failed is a prompt of 20 before 512 "
    "tokens, on MiniLM's 512 positions.",
    "zero-shot": "Models of 2 and 12 million parameters are at chance by either template: no score "
    "is further than six points above the commonest label. What a template brings needs a backbone "
    "that can read it; the paper's has 248 million.",
    "combination": "With all rows each delta alone comes to about the same (69 to 72, from 42), so "
    "that together they add nothing: hence the interactions of -30 points. BitFit takes two points "
    "from either of the others. The three together took the largest rate, which seed 0 chose on "
    "validation rows and with which other seeds fail on SST-2 and TREC (59.0 ±13.0): that the "
    "adapter does not help with all rows rests on that arm. With 16 of each label an adapter and "
    "BitFit add one to two points, as in the paper, and the prompt does too.",
    "gap": "Full tuning has the largest gap, as in the paper. The smallest is that of BitFit, "
    "which also learns least here (61.9 against 68.0). 160 steps see two thirds of the training "
    "rows, once: only the intervals of full tuning and of the adapter leave out zero.",
    "transfer": "Sentiment carries over nearly whole (92 to 96 % of the own score within its "
    "three tasks), and what learned offence or hate in tweets finds hate speech elsewhere (81 to "
    "120 %). Paraphrases carry over to each other no better than sentiment does to them (67 to 73 "
    "% against 72 to 81 %). That all do well on inference says nothing: RTE is learned by none, "
    "its own deltas among them. Always giving the commonest label has 74 to 77 % of the own "
    "score, more than transfer across categories has (69 to 72 %).",
    "forgetting": "With a delta off the loss is what it was, 3.60 nats a token: what a delta has "
    "displaced is had back by taking it off, and full tuning has no such state. With it on "
    "nothing is spared: LoRA's loss rises as much as full tuning's, for a score three points "
    "lower, the adapter's twice as much; those of BitFit and prefix rise two and three times as "
    "much though they learn little, and the prompt's hardly, which learns nothing. LoRA and "
    "adapter took the smallest rate they had, and a smaller one would displace less. Scores on "
    "the other tasks are at chance before, and say little.",
    "scale": "From 2 to 12 million parameters nothing is greatly improved, full tuning neither "
    "(79.6 to 83.1): the three differ by less than a factor of six, were pretrained on the same 6 "
    "million tokens, and are trained for 160 steps; the paper's differ by a factor of 180. "
    "Prompts are at chance with all three, prefixes learn one task of three with the larger two. "
    "That selective-module tuning beats last-layer tuning on the largest rests on TREC (50 "
    "against 26); on the smaller two it is behind, by 10 points and more. Last-layer and "
    "selective-module tuning still had their best rate at the upper edge on five of six.",
    "size": "Prompts and prefixes, the smallest deltas, are ahead of LoRA and adapters of up to a "
    "hundred times as many entries; within LoRA, rank 64 is 1.4 points above rank 1. Only the "
    "narrowest adapter is far behind its kind. TREC decides it: there prompts and prefixes reach "
    "86 to 91 and the others 76 to 77 at every size, in 160 steps and with two rates to choose "
    "from, of which most arms took the larger.",
    "review": "What is behind full tuning is behind it where two texts are compared: on QNLI "
    "nothing but the adapter and child-tuning (half of the weights) is within nine points of it, "
    "on STS-B prompt tuning, AdaLoRA and MAM are 48 to 62 points below the best; CoLA is learned "
    "by none. These need other rates than the two that were tried, or more than 160 steps: [every "
    "delta](deltas.md) has searches of three to six rates. Memory is that of one step on 32 rows "
    "of 128 tokens. Only UniPELT (1.54) and child-tuning (1.01) take more than full tuning, whose "
    "gradients and moments are but 258 MiB on a model of this size.",
    "templates": "Only SST-2 with all rows and no template is learned, and little: 66 at best, by "
    "BitFit with the adapter, from 51 for the commonest label. MRPC is at its commonest label "
    "(65) with all rows, and between the two labels with 32, where seeds differ by up to 17 "
    "points. What the effects of few rows and of templates say is therefore noise about chance. A "
    "template costs 0.8 and 2.3 points: a model of 12 million parameters does not read it, as it "
    "did not untrained (zero-shot). Two rates for each arm put every best one at an edge.",
    "sequence": "The averages of the six orders lie within 1.7 points of each other, those of two "
    "seeds of one order up to 2.8: these rows and seeds do not separate orders, which is what the "
    "paper says of them. RTE is learned by none (54.5 at best, 52.7 for the commonest label).",
}


@dataclass(frozen=True)
class Kept:
    """A study of which cells are kept.

    Attributes:
        name: of it.
        experiment: the experiment that it is.
        parts: what it found.
        state: how far it is.
    """

    name: str
    experiment: str
    parts: Summaries
    state: Status

    @property
    def finished(self) -> bool:
        """Whether its report is to be read."""
        return self.state.ended


def main() -> int:
    """Writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        studies = [read(name, Path(folder)) for name in STUDIES if is_kept(name)]
    lines = [HEAD, *overview(studies)]
    for study in studies:
        if study.finished:
            lines += ["", f"## {study.name}", "", *said(study)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ready = [study for study in studies if study.finished and study.name in SHOWN]
    reported = all((REPORTS / f"{study.name}.html").exists() for study in ready)
    return int(len(ready) < len(STUDIES) or not reported)


def is_kept(name: str) -> bool:
    """Whether there are cells of a study of its own."""
    return (KEPT / f"{name}.jsonl.gz").exists()


def read(name: str, folder: Path) -> Kept:
    """Returns a study as its kept cells have it."""
    begin(name, folder / name)
    store = open_study(folder / name)
    return Kept(name, studied(store).experiment, summaries(store), status(store))


def overview(studies: list[Kept]) -> Iterator[str]:
    """A line for each study."""
    yield "| study | backbones | tasks | methods | seeds | cells | agrees |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for study in studies:
        first, state = next(iter(study.parts.values())).comparison, study.state
        name, cells, agrees = study.name, f"{state.done:,}", ""
        if study.finished:
            name = f"[{study.name}](#{study.name})"
            found = [row[-1] for table in claims(study) for row in table.rows]
            agrees = f"{found.count('yes')} of {len(found)}"
        else:
            cells += ", not finished"
        if state.failures:
            cells += f", {len(state.failures)} failed"
        yield (
            f"| {name} | {', '.join(first.backbones)} | {len(first.tasks)} | "
            f"{len(first.methods)} | {first.seeds} | {cells} | {agrees} |"
        )


def claims(study: Kept) -> Iterator[Table]:
    """What the paper finds, what is found here, and whether they agree."""
    for section in held_to(find_experiment(study.experiment).claims, study.parts):
        for part in section.parts:
            assert isinstance(part, Table)
            yield part


def said(study: Kept) -> Iterator[str]:
    """What the paper finds and what is found here, the averages, and what is to be said of them."""
    experiment = find_experiment(study.experiment)
    shows, beside = experiment.shows, f"{experiment.paper} of {experiment.source}"
    yield f"{shows[0].upper()}{shows[1:]} ({beside}):"
    yield f"[the report](studies/{study.name}.html)."
    for table in claims(study):
        yield from ("", table_as_markdown(replace(table, note="")).rstrip())
    for name, summary in study.parts.items():
        if summary.comparison.budget != NOTHING:
            yield from averages(summary, name)
    yield from ("", SHOWN.get(study.name, "**Nobody has said yet what it shows.**"))


def averages(summary: Summary, part: str) -> Iterator[str]:
    """The mean score of every arm over all tasks, on each backbone."""
    backbones, tasks = summary.comparison.backbones, summary.comparison.tasks
    heads = (Column(""), *(Column(name, "score") for name in backbones), Column("tuned", "percent"))
    rows = tuple(
        (
            f"`{arms[0]}`",
            *(summary.average(arm, tasks) for arm in arms),
            summary.mean(arms[-1], lambda result: result.ratio),
        )
        for arms in zip(*map(summary.arms, backbones), strict=True)
    )
    yield from ("", f"Mean test scores over {len(tasks)} tasks{f', {part}' if part else ''}:", "")
    yield table_as_markdown(Table("", heads, rows, best_of="column")).rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
