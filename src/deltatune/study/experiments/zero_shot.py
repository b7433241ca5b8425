"""Zero-shot: what the backbone does untrained, with the tasks' own templates and manual ones."""

from __future__ import annotations

from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.select import Grid

__all__ = ["EXPERIMENT"]

OWN, MANUAL = "own template", "manual template"


def _parts(base: Comparison) -> Parts:
    untrained = base.model_copy(
        update={
            "methods": ("full",),
            "budget": "nothing",
            "seeds": 1,
            "grid": Grid(),
            "options": {"mode": "rank", **base.options},
        }
    )
    options = {**untrained.options, "template": "manual"}
    return {OWN: untrained, MANUAL: untrained.model_copy(update={"options": options})}


def _sections(summaries: Summaries) -> list[Section]:
    first = next(iter(summaries.values()))
    return [_section(summaries, backbone) for backbone in first.comparison.backbones]


def _section(summaries: Summaries, backbone: str) -> Section:
    columns = (
        Column("task"),
        Column("chance", "score"),
        *(Column(name, "score") for name in summaries),
    )
    rows: list[tuple[Value, ...]] = []
    for task in next(iter(summaries.values())).comparison.tasks:
        found = [s.results(s.arms(backbone)[0], task) for s in summaries.values()]
        chance = next((result.majority for results in found for result in results), None)
        rows.append((task, chance, *(r[0].score if r else None for r in found)))
    return Section(
        f"{backbone} without training",
        "Table 2",
        (
            "The words of the labels are ranked by their loss. Chance is the score of always "
            "giving the commonest label of the training rows.",
        ),
        (Table("Scores", columns, tuple(rows)),),
    )


EXPERIMENT = Experiment(
    name="zero-shot",
    shows="what the backbone does untrained, beside chance",
    paper="Table 2",
    sections=_sections,
    parts=_parts,
    defaults={"backbones": ("t5-mini",), "methods": ("full",)},
)
