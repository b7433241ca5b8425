"""Forgetting: what training on a task costs elsewhere, with the delta on and off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from deltatune.core.errors import ConfigurationError
from deltatune.study.cell import CellResult
from deltatune.study.claim import Claim, Found
from deltatune.study.comparison import TARGETS, Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.over_tasks import named
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.select import Grid
from deltatune.study.summary import Summary
from deltatune.tasks.sources.reading import sha256

__all__ = ["EXPERIMENT"]

TRAINED, UNTRAINED = "trained", "untrained"


def _parts(base: Comparison) -> Parts:
    """Every delta on every task, and the backbone as it is, both looked at on all other tasks."""
    options = {TARGETS: " + ".join(base.tasks), **base.options}
    path = options.get("general_text")
    if path is None:
        raise ConfigurationError(
            "Forgetting is measured on a text of no task. Give a file of rows with a field 'text': "
            "--set options.general_text=wikipedia.jsonl"
        )
    options["general_digest"] = sha256(Path(str(path)))[:16]
    trained = base.model_copy(update={"options": options})
    plain = {"methods": ("full",), "budget": "nothing", "seeds": 1, "grid": Grid()}
    return {TRAINED: trained, UNTRAINED: trained.model_copy(update=plain)}


def _sections(summaries: Summaries) -> list[Section]:
    trained = summaries[TRAINED]
    return [
        _section(trained, summaries.get(UNTRAINED), backbone)
        for backbone in trained.comparison.backbones
    ]


def _section(trained: Summary, untrained: Summary | None, backbone: str) -> Section:
    before = [] if untrained is None else untrained.results(untrained.arms(backbone)[0])
    columns = (
        Column("method"),
        Column("text, before", "number"),
        Column("text, delta on", "number"),
        Column("text, delta off", "number"),
        Column("other tasks, before", "score"),
        Column("other tasks, delta on", "score"),
        Column("its own task", "score"),
    )
    rows: list[tuple[Value, ...]] = []
    for arm in trained.arms(backbone):
        results = trained.results(arm)
        text = [_mean([r.measured.get(name) for r in of]) for name, of in _texts(before, results)]
        elsewhere = [
            value
            for task in trained.comparison.tasks
            for result in trained.results(arm, task)
            for name, value in result.measured.items()
            if name.startswith("on ") and name != f"on {task}"
        ]
        scores = (_mean([r.score for r in before]), _mean(elsewhere))
        rows.append((str(arm), *text, *scores, _mean([r.score for r in results])))
    note = (
        "Text: the backbone's own pretraining loss, in nats a token, on texts of no task; lower is "
        "better. Delta off is the backbone itself, bit for bit; full tuning has no such state."
    )
    table = Table("Means over tasks and seeds", columns, tuple(rows), note=note)
    return Section(f"{backbone}: forgetting", "Applications", parts=(table,))


def _texts(
    before: Sequence[CellResult], after: Sequence[CellResult]
) -> tuple[tuple[str, Sequence[CellResult]], ...]:
    """What is measured on general text, and in which results."""
    return ("text", before), ("text", after), ("text, delta off", after)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _text(results: Sequence[CellResult]) -> float | None:
    return _mean([result.measured.get("text") for result in results])


def _mitigated(summaries: Summaries) -> Mapping[str, Found]:
    if not {TRAINED, UNTRAINED} <= summaries.keys():
        return {}
    trained, untrained, found = summaries[TRAINED], summaries[UNTRAINED], dict[str, Found]()
    for backbone in trained.comparison.backbones:
        before = _text(untrained.results(untrained.arms(backbone)[0]))
        after = {n: _text(trained.results(arm)) for n, arm in named(trained, backbone).items()}
        rises = {n: v - before for n, v in after.items() if v is not None and before is not None}
        if "full" in rises and len(rises) > 1:
            said = ", ".join(f"{name} {rise:+.2f}" for name, rise in rises.items())
            here = f"Loss on texts of no task, against before, in nats a token: {said}."
            agrees = all(rise < rises["full"] for name, rise in rises.items() if name != "full")
            found[backbone] = Found(here, agrees)
    return found


EXPERIMENT = Experiment(
    name="forgetting",
    shows="what training on a task costs elsewhere, with the delta on and off",
    paper="Applications",
    sections=_sections,
    parts=_parts,
    defaults={
        "backbones": ("t5-mini",),
        "methods": ("lora", "adapter", "prefix", "bitfit", "full"),
    },
    claims=(Claim("Deltas mitigate catastrophic forgetting.", _mitigated),),
)
