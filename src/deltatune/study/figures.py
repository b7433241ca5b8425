"""The geometry of the figures: numbers to places on a canvas, which the template of the page draws.

All lengths are pixels of an SVG canvas, whose origin is the upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deltatune.study.summary import Spread

__all__ = ["COLOURS", "Bars", "Dots", "Panel", "bars", "colour", "dots", "panel", "ticks"]

# The palette of Okabe and Ito: told apart with any kind of colour vision, on light and on dark.
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8c8c8c",
    "#b8a800",
    "#7a4fbf",
    "#a05a2c",
)
# The arms beyond the palette repeat its colours with other dashes.
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def colour(number: int) -> str:
    """Returns the colour of the arm with this number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    """Returns the dashes of the arm with this number, "" for a solid line."""
    return DASHES[number // len(COLOURS) % len(DASHES)]


@dataclass(frozen=True)
class Scale:
    """A map of values to places, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Returns the place of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = 0.5 if high == low else (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round values from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the arm's number and name, and the places it passes through."""

    number: int
    name: str
    points: tuple[tuple[float, float], ...]
    ringed: tuple[float, float] | None = None

    @property
    def path(self) -> str:
        """The places as an SVG polyline wants them."""
        return " ".join(f"{x},{y}" for x, y in self.points)


@dataclass(frozen=True)
class Panel:
    """A small plot of curves with its axes: (place, label) for each tick."""

    title: str
    across: str
    width: int
    height: int
    left: int
    right: int
    bottom: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def panel(
    title: str,
    across: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    numbers: Mapping[str, int],
    logarithmic: bool = False,
    rings: Mapping[str, float] | None = None,
    width: int = 340,
    height: int = 220,
) -> Panel | None:
    """Lays out curves of scores (fractions, shown times 100) over steps, seconds or rates.

    Args:
        title: what the plot shows.
        across: what the horizontal axis counts.
        series: name -> (x, score) in rising order of x; values that are not finite are left out.
        numbers: name -> number of the arm, which decides the colour.
        logarithmic: whether the horizontal axis is.
        rings: name -> the x of a point to mark.
        width: of the canvas.
        height: of the canvas.

    Returns:
        The plot, or None if no curve has a point.
    """
    clean = {
        name: [(x, 100 * y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    if not xs:
        return None
    left, right, top, bottom = 40, width - 26, 26, height - 34
    margin = max(0.06 * (max(ys) - min(ys)), 0.5)
    x = Scale(min(xs) if logarithmic else 0.0, max(xs), left, right, logarithmic)
    y = Scale(min(ys) - margin, max(ys) + margin, bottom, top)
    marks = sorted(set(xs)) if logarithmic else ticks(x.low, x.high, 4)
    curves = [
        Curve(
            numbers[name], name, tuple((x(a), y(b)) for a, b in points), _ring(points, x, y, ring)
        )
        for name, points in clean.items()
        if points
        for ring in [(rings or {}).get(name)]
    ]
    return Panel(
        title=title,
        across=across,
        width=width,
        height=height,
        left=left,
        right=right,
        bottom=bottom,
        x_ticks=tuple((x(mark), f"{mark:g}") for mark in marks),
        y_ticks=tuple((y(mark), f"{mark:g}") for mark in ticks(y.low, y.high, 4)),
        curves=tuple(curves),
    )


def _ring(
    points: Sequence[tuple[float, float]], x: Scale, y: Scale, at: float | None
) -> tuple[float, float] | None:
    return next(((x(a), y(b)) for a, b in points if a == at), None)


@dataclass(frozen=True)
class Bar:
    """One bar: the arm's number and name, its length and what is written beside it."""

    number: int
    name: str
    length: float
    label: str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars under a title."""

    title: str
    bars: tuple[Bar, ...]


def bars(
    title: str, values: Mapping[str, float | None], write: Callable[[float], str]
) -> Bars | None:
    """Lays out a bar for each name that has a value; None if none has.

    Lengths are shares of the longest bar.
    """
    longest = max((v for v in values.values() if v is not None), default=0.0)
    if not longest:
        return None
    found = [
        Bar(number, name, round(value / longest, 4), write(value))
        for number, (name, value) in enumerate(values.items())
        if value is not None
    ]
    return Bars(title, tuple(found))


@dataclass(frozen=True)
class Dot:
    """One score: the arm's number and name, its place, the ends of its spread, what it says."""

    number: int
    name: str
    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Line:
    """One task of a dot plot: its name, its height and the place of the commonest label."""

    name: str
    y: float
    majority: float | None
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Dots:
    """Scores of all arms, a line a task."""

    width: int
    height: int
    left: int
    x_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def dots(
    rows: Sequence[tuple[str, Sequence[Spread | None], float | None]],
    names: Sequence[str],
    width: int = 1040,
) -> Dots:
    """Lays out a line of dots for each (task, scores of the arms, score of the commonest label)."""
    means = [e.mean for _, entries, _ in rows for e in entries if e is not None]
    baselines = [majority for _, _, majority in rows if majority is not None]
    finite = [100 * value for value in [*means, *baselines] if math.isfinite(value)] or [0.0, 100.0]
    left, pitch = 250, 15 + 5 * len(names)
    low, high = math.floor(min(finite) / 5) * 5, math.ceil(max(finite) / 5) * 5
    x = Scale(low, max(high, low + 5), left + 14, width - 24)
    lines = []
    for place, (name, entries, majority) in enumerate(rows):
        middle = 30.0 + pitch * place + pitch / 2
        found = [
            _dot(number, names[number], entry, x, middle + 5 * (number - (len(names) - 1) / 2))
            for number, entry in enumerate(entries)
            if entry is not None and math.isfinite(entry.mean)
        ]
        lines.append(
            Line(name, middle, None if majority is None else x(100 * majority), tuple(found))
        )
    marks = ticks(x.low, x.high, 8)
    height = 30 + pitch * len(rows) + 10
    return Dots(width, height, left, tuple((x(m), f"{m:g}") for m in marks), tuple(lines))


def _dot(number: int, name: str, entry: Spread, x: Scale, y: float) -> Dot:
    deviation = entry.deviation or 0.0
    label = f"{name}: {100 * entry.mean:.2f}" + (f" ±{100 * deviation:.2f}" if deviation else "")
    ends = [min(max(x(100 * (entry.mean + sign * deviation)), x.start), x.end) for sign in (-1, 1)]
    return Dot(number, name, x(100 * entry.mean), y, ends[0], ends[1], label)
