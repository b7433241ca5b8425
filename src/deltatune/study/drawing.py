"""The figures of a report as SVG text that stands inside a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from deltatune.study.canvas import (
    INK,
    LONGEST_NAME,
    WIDTH,
    as_svg,
    blank,
    colour,
    dash,
    line_height,
    plotting,
    short,
    text_size,
    wrapped,
)
from deltatune.study.placing import Box, placed
from deltatune.study.rank_diagram import ranks
from deltatune.study.section import Bars, Figure, HeatMap, Lines, Place, Ranks, Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

__all__ = ["draw", "front"]

HEIGHT = 200.0  # of the axes of a plot
LEGEND_WIDTH = 400.0
MANY_PLACES = 12  # of more the front alone is named


def draw(figure: Figure) -> str:
    """Returns the figure as one SVG element, the same bytes for the same figure.

    Values that are not finite are left out; a figure without any says so.

    Raises:
        UnsupportedError: matplotlib is missing.
    """
    with plotting():
        match figure:
            case Lines():
                plot = _lines(figure)
            case Scatter():
                plot = _scatter(figure)
            case Bars():
                plot = _bars(figure)
            case HeatMap():
                plot = _heat_map(figure)
            case Ranks():
                plot = ranks(figure)
        return as_svg(plot, figure.title)


def _lines(figure: Lines) -> Plot:
    plot, axes = blank(WIDTH, HEIGHT)
    handles: dict[str, Any] = {}
    places: list[float] = []
    for number, series in enumerate(figure.series):
        kept = [n for n, point in enumerate(series.points) if all(map(math.isfinite, point))]
        if not kept:
            continue
        xs, ys = zip(*(series.points[n] for n in kept), strict=True)
        places += xs
        look: dict[str, Any] = {"color": colour(number), "linewidth": 1.8}
        if series.band:
            band = [n for n in kept if all(map(math.isfinite, series.band[n]))]
            axes.fill_between(
                [series.points[n][0] for n in band],
                [series.band[n][0] for n in band],
                [series.band[n][1] for n in band],
                color=look["color"],
                alpha=0.18,
                linewidth=0,
            )
        (line,) = axes.plot(xs, ys, linestyle=dash(number), **look)
        axes.plot(xs, ys, "o", markersize=3.5, color=look["color"])
        rings = [series.points[n] for n in kept if n in series.ringed]
        for x, y in rings:
            axes.plot([x], [y], "o", markersize=10, fillstyle="none", markeredgewidth=1.6, **look)
        handles[series.name] = line
    _frame(axes, figure.x, figure.y, places, figure.logarithmic)
    _legend(plot, axes, handles)
    return plot


def _frame(axes: Axes, x: str, y: str, places: Sequence[float], logarithmic: bool) -> None:
    """Names and divides the axes of a plot with these x."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(wrapped(x, 50))
    axes.set_ylabel(wrapped(y, 30), rotation_mode="anchor")
    axes.grid(visible=True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 6)))
    positive = [place for place in places if place > 0]
    if logarithmic and positive:
        _logarithmic(axes, places, min(positive))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 6)))
    if not places:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")


def _logarithmic(axes: Axes, places: Sequence[float], smallest: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    if min(places) > 0:
        axes.set_xscale("log")
        decades = math.log10(max(places) / smallest)
        steps = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 3 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=7))
    else:  # an arm without any tunable parameter has its place at the left
        axes.set_xscale("symlog", linthresh=smallest)
        first, last = math.ceil(math.log10(smallest)), math.floor(math.log10(max(places)))
        step = 1 + max(last - first, 0) // 5
        axes.set_xticks([0.0, *(10.0**power for power in range(first, last + 1, step))])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(plot: Plot, axes: Axes, handles: dict[str, Any]) -> None:
    """Writes names below a plot, in as many columns as there is room for."""
    if not handles:
        return
    names = [wrapped(name, 52) for name in handles]
    widest = max(width for width, _ in text_size(plot, names, 10))
    axes.legend(
        list(handles.values()),
        names,
        loc="upper left",
        bbox_to_anchor=(-40 / WIDTH, -42 / (axes.bbox.height or 1.0)),
        ncols=max(1, min(len(names), int(LEGEND_WIDTH // (widest + 52)))),
        borderaxespad=0,
        columnspacing=1.4,
    )


def front(places: Iterable[Place]) -> list[Place]:
    """Returns the places that none beats in both x (low) and y (high), by rising x."""
    found: list[Place] = []
    for place in sorted(places, key=lambda place: (place.x, -place.y)):
        if not found or place.y > found[-1].y:
            found.append(place)
    return found


def _scatter(figure: Scatter) -> Plot:
    plot, axes = blank(WIDTH, HEIGHT * 1.25)
    places = [p for p in figure.places if math.isfinite(p.x) and math.isfinite(p.y)]
    best = front(places)
    axes.step(
        [place.x for place in best],
        [place.y for place in best],
        where="post",
        color=colour(0),
        alpha=0.6,
        linewidth=1.4,
    )
    dots: dict[Place, Any] = {}
    for place in places:
        # Filled or hollow: the front is not told by its colour alone.
        face = colour(0) if place in best else "none"
        edge = colour(0) if place in best else colour(6)
        look: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": edge}
        (dots[place],) = axes.plot(
            [place.x], [place.y], "o", markersize=6.5, markeredgewidth=1.5, **look
        )
    axes.margins(0.14)
    _frame(axes, figure.x, figure.y, [place.x for place in places], figure.logarithmic)
    _name(plot, axes, dots, best)
    return plot


def _name(plot: Plot, axes: Axes, dots: Mapping[Place, Any], best: Sequence[Place]) -> None:
    """Writes the names of points beside them; numbers where there is no room, and a key below.

    Of many points those of the front are named.
    """
    axes.autoscale_view()
    points = {
        place: (float(x), float(y))
        for place in dots
        for x, y in [axes.transData.transform((place.x, place.y))]
    }
    drawn = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points.values()]
    for (left, low), (right, high) in pairwise(points[place] for place in best):
        drawn += [Box(left, low - 3, right, low + 3), Box(right - 3, low, right + 3, high)]
    inside = Box(0.0, 0.0, axes.bbox.width, axes.bbox.height)
    if len(points) > MANY_PLACES:
        points = {place: points[place] for place in best}
    names = [wrapped(place.name, LONGEST_NAME) for place in points]
    spots = placed(list(points.values()), text_size(plot, names, 10), drawn, inside)
    if any(spot.covered for spot in spots):
        _legend(plot, axes, {f"{n}: {p.name}": dots[p] for n, p in enumerate(points, 1)})
        names = [str(number) for number in range(1, len(points) + 1)]
        spots = placed(list(points.values()), text_size(plot, names, 10), drawn, inside)
    for (x, y), name, (box, near, _) in zip(points.values(), names, spots, strict=True):
        look: dict[str, Any] = {"xycoords": "axes pixels", "annotation_clip": False}
        if not near:
            end = (min(max(x, box.left), box.right), min(max(y, box.lower), box.upper))
            line = {"arrowstyle": "-", "color": INK, "alpha": 0.4, "linewidth": 0.7}
            line |= {"shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), end, textcoords="axes pixels", arrowprops=line, **look)
        middle = ((box.left + box.right) / 2, (box.lower + box.upper) / 2)
        axes.annotate(name, middle, fontsize=10, ha="center", va="center", **look)


def _bars(figure: Bars) -> Plot:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = [wrapped(name, LONGEST_NAME) for name in figure.bars]
    plot, axes = blank(WIDTH * 0.75, line_height(names, 24.0) * max(1, len(names)) + 8)
    parts = list(dict.fromkeys(part for bar in figure.bars.values() for part in bar))
    for row, bar in enumerate(figure.bars.values()):
        ends = [0.0, 0.0]  # of what is piled up to the left and to the right
        heights = {part: height for part, height in bar.items() if math.isfinite(height)}
        for part, height in heights.items():
            side = int(height >= 0)
            axes.barh(row, height, 0.68, left=ends[side], color=colour(parts.index(part)))
            ends[side] += height
        if heights:
            whole = short(math.fsum(heights.values()))
            axes.annotate(
                whole, (ends[1], row), (5, 0), textcoords="offset points", va="center", size=10
            )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(wrapped(figure.y, 50))
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 6)))
    if len(parts) > 1:
        _legend(plot, axes, {part: Patch(color=colour(n)) for n, part in enumerate(parts)})
    return plot


def _heat_map(figure: HeatMap) -> Plot:
    import numpy
    from matplotlib import colormaps

    rows, columns = max(1, len(figure.rows)), max(1, len(figure.columns))
    titles = [wrapped(name, LONGEST_NAME) for name in figure.columns]
    names = [wrapped(name, LONGEST_NAME) for name in figure.rows]
    plot, axes = blank(line_height(titles, 48.0) * columns, line_height(names, 25.0) * rows)
    values = numpy.array(
        [[math.nan if value is None else value for value in row] for row in figure.values],
        dtype=float,
    ).reshape(len(figure.rows), len(figure.columns))
    known = numpy.ma.masked_invalid(values)
    if known.count():
        # Viridis rises in lightness by equal steps, to all kinds of colour vision.
        axes.pcolormesh(known, cmap="viridis", linewidth=0)
    low, high = (known.min(), known.max()) if known.count() else (0.0, 0.0)
    for (row, column), value in numpy.ndenumerate(values):
        if math.isfinite(value):
            share = 0.0 if high == low else (value - low) / (high - low)
            ink = _contrast(colormaps["viridis"](share))
            axes.text(
                column + 0.5,
                row + 0.5,
                short(value, 3),
                color=ink,
                ha="center",
                va="center",
                size=10,
            )
    narrow = all(len(name) < 7 for name in figure.columns)
    turned: dict[str, Any] = (
        {} if narrow else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(numpy.arange(len(titles)) + 0.5, titles, **turned)
    axes.set_yticks(numpy.arange(len(names)) + 0.5, names)
    axes.set_ylim(rows, 0)
    axes.set_xlim(0, columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return plot


def _contrast(background: Sequence[float]) -> str:
    """Returns a dark or a light grey, what is read better on this colour (WCAG's luminance)."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in background[:3]
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#111111" if luminance > 0.18 else "#ffffff"
