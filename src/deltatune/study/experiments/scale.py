"""Scale: what grows with the backbone: scores, and how soon they are reached."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from deltatune.study.cell import Arm, CellResult
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.convergence import reached, with_curve
from deltatune.study.section import Column, Lines, Section, Series, Table, Value
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT"]

SHARE = 0.9


def _parts(base: Comparison) -> Parts:
    return {"": with_curve(base)}


def _sections(summaries: Summaries) -> list[Section]:
    return [_section(summary) for summary in summaries.values()]


def _section(summary: Summary) -> Section:
    comparison = summary.comparison
    columns = (
        Column("method"),
        Column("backbone"),
        Column("parameters", "count"),
        Column("tuned", "percent"),
        Column("score", "score"),
        Column(f"steps to {100 * SHARE:g} %", "number"),
    )
    rows, lines = list[tuple[Value, ...]](), list[Series]()
    for method in comparison.methods:
        points = []
        for backbone in comparison.backbones:
            arm = Arm(backbone=backbone, method=method, at=comparison.at)
            results = summary.results(arm)
            if not results:
                continue
            size, score = fmean(r.base for r in results), fmean(r.score for r in results)
            tuned = fmean(result.ratio for result in results)
            rows.append((method, backbone, size, tuned, score, _soon(results)))
            points.append((size, score))
        lines.append(Series(method, tuple(sorted(points))))
    figure = Lines(
        "Mean score against size",
        "parameters of the backbone",
        "score",
        tuple(line for line in lines if line.points),
        logarithmic=True,
    )
    return Section(
        "Scale",
        "Fig. 3",
        ("The paper's backbones are T5 small (60 million), base and XXL (11 billion).",),
        (Table("Every method on every backbone", columns, tuple(rows)), figure),
    )


def _soon(results: Sequence[CellResult]) -> float | None:
    """The median of the steps after which a run has most of its best score."""
    known = [reached(result, SHARE, lambda point: point.step) for result in results]
    steps = [step for step in known if step is not None]
    return median(steps) if steps else None


EXPERIMENT = Experiment(
    name="scale",
    shows="what grows with the backbone: scores, and how soon they are reached",
    paper="Fig. 3",
    sections=_sections,
    parts=_parts,
    defaults={
        "backbones": ("t5-nano", "t5-micro", "t5-mini"),
        "methods": ("adapter", "lora", "prefix", "prompt", "last_layer", "selective_module"),
    },
)
