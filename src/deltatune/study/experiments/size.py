"""Size: whether score and convergence depend on how many parameters a delta has, or on its kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import Arm, CellResult
from deltatune.study.claim import Claim, Found, Look, everywhere
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.convergence import area, with_curve
from deltatune.study.section import Column, Lines, Section, Series, Table, Value
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT"]

METHODS = (
    *(f"lora(rank={rank})" for rank in (1, 4, 16, 64)),
    *(f"adapter(bottleneck={width})" for width in (2, 8, 32, 128)),
    *(f"prompt(length={length})" for length in (1, 5, 20, 100)),
)


def _parts(base: Comparison) -> Parts:
    return {"": with_curve(base)}


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _section(summary, backbone)
        for summary in summaries.values()
        for backbone in summary.comparison.backbones
    ]


def _section(summary: Summary, backbone: str) -> Section:
    rows: list[tuple[Value, ...]] = []
    scores, areas = (defaultdict[str, list[tuple[float, float]]](list) for _ in range(2))
    for arm in summary.arms(backbone):
        results = summary.results(arm)
        if not results:
            continue
        count, score = fmean(r.trainable for r in results), fmean(r.score for r in results)
        curves = [found for found in map(area, results) if found is not None]
        kind = _kind(arm)
        scores[kind].append((count, 100 * score))
        if curves:
            areas[kind].append((count, 100 * fmean(curves)))
        rows.append((str(arm), count, score, fmean(curves) if curves else None))
    columns = (
        Column("method"),
        Column("tuned parameters", "count"),
        Column("score", "score"),
        Column("area under the curve", "score"),
    )
    figures = tuple(
        _lines(title, found)
        for title, found in (("Score", scores), ("Area under the curve", areas))
        if found
    )
    return Section(
        f"{backbone}: size",
        "section Theoretical and experimental analysis",
        ("The paper: structure decides, the number of parameters hardly does.",),
        (*figures, Table("Every size", columns, tuple(rows))),
    )


def _lines(title: str, found: dict[str, list[tuple[float, float]]]) -> Lines:
    series = tuple(Series(kind, tuple(sorted(points))) for kind, points in found.items())
    return Lines(f"{title} against size", "tuned parameters", title.lower(), series, True)


def _kind(arm: Arm) -> str:
    """Names of the methods without their settings."""
    return " + ".join(method.name for method in parse(arm.method).methods)


def _kind_decides(of: Callable[[Sequence[CellResult]], float | None]) -> Look:
    """Whether a value differs more between kinds of delta than between sizes of one."""

    def look(summary: Summary, backbone: str) -> Found | None:
        kinds: dict[str, list[float]] = defaultdict(list)
        for arm in summary.arms(backbone):
            if (value := of(summary.results(arm))) is not None:
                kinds[_kind(arm)].append(value)
        several = {kind: values for kind, values in kinds.items() if len(values) > 1}
        if len(several) < 2:
            return None
        within = {kind: max(values) - min(values) for kind, values in several.items()}
        means = [fmean(values) for values in several.values()]
        between = max(means) - min(means)
        said = ", ".join(f"{kind} {100 * spread:.1f}" for kind, spread in within.items())
        here = f"Points between sizes of a kind: {said}; between kinds: {100 * between:.1f}."
        return Found(here, between > fmean(within.values()))

    return everywhere(look)


def _score(results: Sequence[CellResult]) -> float | None:
    return fmean(result.score for result in results) if results else None


def _area(results: Sequence[CellResult]) -> float | None:
    areas = [found for found in map(area, results) if found is not None]
    return fmean(areas) if areas else None


EXPERIMENT = Experiment(
    name="size",
    shows="whether score and convergence depend on a delta's size or on its kind",
    paper="section Theoretical and experimental analysis",
    sections=_sections,
    parts=_parts,
    defaults={"methods": METHODS},
    claims=(
        Claim(
            "Performance depends on the structure of a delta, not on its number of parameters.",
            _kind_decides(_score),
        ),
        Claim("So is convergence (the area under the curve).", _kind_decides(_area)),
    ),
)
