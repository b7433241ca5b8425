"""Scale: what grows with the backbone: scores, and how soon they are reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

from deltatune.study.cell import Arm, CellResult
from deltatune.study.claim import Claim, Found
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.convergence import reached, with_curve
from deltatune.study.experiments.over_tasks import in_order
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
            points.append((size, 100 * score))
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


def _by_size(
    summary: Summary, of: Callable[[Sequence[CellResult]], float | None]
) -> dict[str, list[float]]:
    """Delta -> a value on each backbone, the smallest first; of those that have it on all."""
    comparison, found = summary.comparison, dict[str, list[float]]()
    for method in comparison.methods:
        arms = [Arm(backbone=b, method=method, at=comparison.at) for b in comparison.backbones]
        results = sorted(filter(None, map(summary.results, arms)), key=lambda one: one[0].base)
        values = [value for one in results if (value := of(one)) is not None]
        if method != "full" and 1 < len(values) == len(arms):
            found[method] = values
    return found


def _score(results: Sequence[CellResult]) -> float:
    return fmean(result.score for result in results)


def _grows(summaries: Summaries) -> Mapping[str, Found]:
    (summary,) = summaries.values()
    found = _by_size(summary, _score)
    rises = [values[-1] > values[0] for values in found.values()]
    said = ", ".join(f"{n} {100 * v[0]:.1f} to {100 * v[-1]:.1f}" for n, v in found.items())
    return {"smallest to largest": Found(f"{said}.", all(rises))} if found else {}


def _sooner(summaries: Summaries) -> Mapping[str, Found]:
    (summary,) = summaries.values()
    found = _by_size(summary, _soon)
    sooner = sum(values[-1] <= values[0] for values in found.values())
    said = ", ".join(f"{name} {v[0]:.0f} to {v[-1]:.0f}" for name, v in found.items())
    here = f"Steps to {100 * SHARE:.0f} % of a run's best: {said}."
    return {"smallest to largest": Found(here, sooner > len(found) / 2)} if found else {}


def _selective_leads(summaries: Summaries) -> Mapping[str, Found]:
    (summary,) = summaries.values()
    last = {n: v[-1] for n, v in _by_size(summary, _score).items()}
    if not {"selective_module", "last_layer"} <= last.keys():
        return {}
    here = {name: last[name] for name in ("selective_module", "last_layer")}
    agrees = here["selective_module"] > here["last_layer"]
    return {"largest backbone": Found(f"{in_order(here)}.", agrees)}


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
    claims=(
        Claim("With scale the performance of all deltas is greatly improved.", _grows),
        Claim("With scale their convergence is accelerated.", _sooner),
        Claim(
            "Selective-module tuning is slightly better than last-layer tuning.", _selective_leads
        ),
    ),
)
