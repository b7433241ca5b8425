"""Efficiency: memory of a step by batch and backbone, and its time by the length of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from deltatune.study.cell import Arm, CellResult
from deltatune.study.claim import Claim, Found, Look
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.over_tasks import named
from deltatune.study.experiments.step_memory import MIB, profiled
from deltatune.study.section import Bars, Column, Lines, Section, Series, Table, Value
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT"]

BATCHES, LENGTH = (0, 1, 8, 32, 64), 128
LENGTHS, ROWS = (32, 64, 128, 256, 512), 8
HELD = ("static", "activations", "gradients", "optimiser")


def _parts(base: Comparison) -> Parts:
    """Nothing is trained but the steps that are measured, on the text of one task."""

    by_batch = {f"batch {rows}": profiled(base, rows, LENGTH) for rows in BATCHES}
    return by_batch | {f"length {tokens}": profiled(base, ROWS, tokens) for tokens in LENGTHS}


def _sections(summaries: Summaries) -> list[Section]:
    first = next(iter(summaries.values()))
    found = []
    for backbone in first.comparison.backbones:
        arms = first.arms(backbone)
        found += [_memory(summaries, arms, backbone), _time(summaries, arms, backbone)]
    return found


def _memory(summaries: Summaries, arms: Sequence[Arm], backbone: str) -> Section:
    columns = (
        Column("method"),
        Column("rows", "count"),
        *(Column(f"{name}, MiB", "number") for name in (*HELD, "counted", "peak")),
    )
    rows, bars = list[tuple[Value, ...]](), dict[str, Mapping[str, float]]()
    for arm in arms:
        for count, result in _of(summaries, arm, "batch"):
            held = {name: result.measured[f"profile {name}"] / MIB for name in HELD}
            whole = (result.measured[f"profile {name}"] / MIB for name in ("counted", "peak"))
            rows.append((str(arm), count, *held.values(), *whole))
            if count in (1, 32):
                bars[f"{arm}, {count}"] = held
    figure = Bars("What a step holds, by rows of the batch", "MiB", bars)
    note = (
        f"Rows of {LENGTH} tokens. Counted: the bytes of all tensors that are held. Peak: the "
        "highest that was taken, which also has what lives within an operation. Batch 0: no step."
    )
    table = Table("Memory of a step", columns, tuple(rows), note=note)
    return Section(f"{backbone}: memory", "Fig. 2", (), (table, *([figure] if bars else [])))


def _time(summaries: Summaries, arms: Sequence[Arm], backbone: str) -> Section:
    parts = ("forward", "backward", "update")
    columns = (
        Column("method"),
        Column("tokens", "count"),
        *(Column(f"{name}, ms", "number") for name in parts),
    )
    rows = list[tuple[Value, ...]]()
    lines: dict[str, list[Series]] = {"forward": [], "backward": []}
    for arm in arms:
        found = _of(summaries, arm, "length")
        for length, result in found:
            times = (1000 * result.measured[f"profile {name}"] for name in parts)
            rows.append((str(arm), length, *times))
        for name, series in lines.items():
            points = tuple((n, 1000 * r.measured[f"profile {name}"]) for n, r in found)
            series.append(Series(str(arm), points))
    figures = tuple(
        Lines(f"Time of a {name} pass", "tokens of a row", "ms", drawn)
        for name, series in lines.items()
        if (drawn := tuple(one for one in series if one.points))
    )
    note = f"{ROWS} rows; the shortest of five."
    table = Table("Time of a step", columns, tuple(rows), note=note)
    return Section(f"{backbone}: time", "Extended Data Fig. 3", (), (table, *figures))


def _of(summaries: Summaries, arm: Arm, kind: str) -> list[tuple[int, CellResult]]:
    """The results of an arm in the parts "batch 0", "batch 1", ... with their numbers."""
    found = []
    for name, summary in summaries.items():
        what, _, number = name.partition(" ")
        results = _measured(summary, arm) if what == kind else []
        found += [(int(number), result) for result in results]
    return found


def _measured(summary: Summary, arm: Arm) -> list[CellResult]:
    return [result for result in summary.results(arm) if "profile static" in result.measured]


def _table(
    summaries: Summaries, backbone: str, kind: str, what: str
) -> dict[str, dict[int, float]]:
    """Method -> a measure by rows of the batch or tokens of the input."""
    first = next(iter(summaries.values()))
    found = {
        name: {count: r.measured[f"profile {what}"] for count, r in _of(summaries, arm, kind)}
        for name, arm in named(first, backbone).items()
    }
    return {name: values for name, values in found.items() if values}


def _each(summaries: Summaries, look: Callable[[str], Found | None]) -> dict[str, Found]:
    backbones = next(iter(summaries.values())).comparison.backbones
    return {b: found for b in backbones if (found := look(b)) is not None}


def _saved(summaries: Summaries) -> Mapping[str, Found]:
    def look(backbone: str) -> Found | None:
        held = _table(summaries, backbone, "batch", "counted")
        full = held.pop("full", {})
        shares = {
            count: [1 - v[count] / whole for v in held.values() if count in v]
            for count, whole in full.items()
            if count
        }
        few, many = (
            [share for count, found in shares.items() if (count <= 8) == small for share in found]
            for small in (True, False)
        )
        if not few or not many:
            return None
        here = (
            f"Bytes held, less than by full tuning: {min(few):.0%} to {max(few):.0%} at up to 8 "
            f"rows, {min(many):.0%} to {max(many):.0%} at more."
        )
        return Found(here, max(few) >= 0.5 and max(few) > max(many) > 0)

    return _each(summaries, look)


def _bitfit_least(summaries: Summaries) -> Mapping[str, Found]:
    def look(backbone: str) -> Found | None:
        held = _table(summaries, backbone, "batch", "counted")
        most = max((max(values) for values in held.values()), default=0)
        at = {name: values[most] for name, values in held.items() if most in values}
        if "bitfit" not in at or len(at) < 2:
            return None
        least = min(at, key=at.__getitem__)
        said = ", ".join(f"{name} {value / MIB:.0f}" for name, value in at.items())
        return Found(f"MiB at {most} rows: {said}.", least == "bitfit")

    return _each(summaries, look)


def _times(what: str, agrees: Callable[[float], bool], only: str | None = None) -> Look:
    """The time of a pass against that of full tuning, over all lengths; of one method only."""

    def of_all(summaries: Summaries) -> Mapping[str, Found]:
        def look(backbone: str) -> Found | None:
            times = _table(summaries, backbone, "length", what)
            full = times.pop("full", {})
            ratios = {
                name: fmean(values[n] / full[n] for n in values if n in full)
                for name, values in times.items()
                if only in (None, name) and values.keys() & full.keys()
            }
            said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            held = all(map(agrees, ratios.values()))
            return Found(f"Times of full tuning's: {said}.", held) if ratios else None

        return _each(summaries, look)

    return of_all


EXPERIMENT = Experiment(
    name="efficiency",
    shows="memory of a step by batch and backbone, and its time by the length of the input",
    paper="Fig. 2, Extended Data Fig. 3",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "bitfit", "adapter", "lora", "full")},
    claims=(
        Claim(
            "Deltas save up to 3/4 of the memory at 1 and 8 rows, 1/2 to 1/3 at 32 and 64.", _saved
        ),
        Claim("BitFit is the most memory efficient.", _bitfit_least),
        Claim(
            "The backward pass of deltas is shorter than that of fine-tuning.",
            _times("backward", lambda ratio: ratio < 1),
        ),
        Claim(
            "Adapters make the forward pass longer.",
            _times("forward", lambda ratio: ratio > 1, "adapter"),
        ),
    ),
)
