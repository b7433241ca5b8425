"""Zero-shot: what the backbone does untrained, with the tasks' own templates and manual ones."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from deltatune.study.claim import Claim, Found
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
        (Table("Scores", columns, tuple(rows), best_of="row"),),
    )


def _templates_help(summaries: Summaries) -> Mapping[str, Found]:
    if not {OWN, MANUAL} <= summaries.keys():
        return {}
    parts, found = (summaries[OWN], summaries[MANUAL]), {}
    for backbone in parts[0].comparison.backbones:
        pairs = [
            [summary.spread(summary.arms(backbone)[0], task) for summary in parts]
            for task in parts[0].comparison.tasks
        ]
        known = [(a.mean, b.mean) for a, b in pairs if a is not None and b is not None]
        if known:
            own, manual = (fmean(scores) for scores in zip(*known, strict=True))
            said = f"{100 * own:.1f} to {100 * manual:.1f} over {len(known)} tasks"
            found[backbone] = Found(f"From {said}.", manual > own)
    return found


EXPERIMENT = Experiment(
    name="zero-shot",
    shows="what the backbone does untrained, beside chance",
    paper="Table 2",
    sections=_sections,
    parts=_parts,
    defaults={"backbones": ("t5-mini",), "methods": ("full",)},
    claims=(
        Claim(
            "Manual templates substantially improve zero-shot scores (23.7 to 43.4).",
            _templates_help,
        ),
    ),
)
