"""The diagram of critical differences: mean ranks on one axis (Demsar 2006, JMLR 7, Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltatune.study.canvas import (
    INK,
    LONGEST_NAME,
    WIDTH,
    blank,
    colour,
    line_height,
    short,
    wrapped,
)
from deltatune.study.section import Ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

__all__ = ["cliques", "ranks"]

TOP = 46.0  # where the axis stands; below it are the bars, then the names


def cliques(ranks: Sequence[float], distance: float) -> list[tuple[int, int]]:
    """Returns the first and the last of each longest run of ranks less than `distance` apart.

    Args:
        ranks: rising.
        distance: ranks that differ by less cannot be told apart.
    """
    found: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = max(n for n, other in enumerate(ranks) if n == first or other - rank < distance)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def ranks(figure: Ranks) -> Plot:
    """Returns the diagram, the best at the left, drawn under `canvas.plotting`."""
    ordered = sorted((rank, name) for name, rank in figure.ranks.items() if math.isfinite(rank))
    found = [rank for rank, _ in ordered]
    low, high = math.floor(min([1.0, *found])), math.ceil(max([2.0, len(found), *found]))
    groups = cliques(found, figure.distance)
    levels = _levels([(found[a], found[b]) for a, b in groups])
    pitch = line_height([wrapped(name, LONGEST_NAME) for _, name in ordered], 19.0)
    names = TOP + 12 + 8 * (max(levels, default=-1) + 1)
    bottom = names + pitch * ((len(ordered) + 1) // 2)
    plot, axes = blank(WIDTH, bottom)
    axes.set_axis_off()
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, 0)
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0, "clip_on": False}
    axes.plot([low, high], [TOP, TOP], **line)
    for mark in range(low, high + 1, max(1, (high - low) // 8)):
        axes.plot([mark, mark], [TOP - 5, TOP], **line)
        axes.text(mark, TOP - 8, str(mark), ha="center", va="bottom", size=10)
    said = f"critical difference {short(figure.distance, 3)}"
    if 0 < figure.distance <= high - low:
        axes.plot([low, low + figure.distance], [18, 18], **line, marker="|", markersize=7)
    axes.text(low, 11, said, va="bottom", size=10)
    for (first, last), level in zip(groups, levels, strict=True):
        height = TOP + 8 + 8 * level
        thick = {**line, "linewidth": 3.5, "color": colour(0), "solid_capstyle": "round"}
        axes.plot([found[first], found[last]], [height, height], **thick)
    _stems(axes, ordered, (names, pitch), line)
    return plot


def _stems(
    axes: Axes,
    ordered: Sequence[tuple[float, str]],
    rows: tuple[float, float],
    line: dict[str, Any],
) -> None:
    """Leads a line from each rank to its name, the better half to the left.

    Args:
        axes: of the diagram.
        ordered: (rank, name), rising.
        rows: where the names begin, and how far they stand apart.
        line: its look, that of the axis.
    """
    start, pitch = rows
    low, high = axes.get_xlim()
    margin = 10 / WIDTH * (high - low)
    for number, (rank, name) in enumerate(ordered):
        left = 2 * number < len(ordered)
        row = number if left else len(ordered) - 1 - number
        height = start + pitch * (row + 0.5)
        edge = low - margin if left else high + margin
        axes.plot([rank, rank, edge], [TOP, height, height], **{**line, "linewidth": 0.8})
        words = [wrapped(name, LONGEST_NAME), f"{rank:.2f}"]
        axes.annotate(
            "  ".join(words if left else words[::-1]),
            (edge, height),
            (-4 if left else 4, 0),
            textcoords="offset points",
            annotation_clip=False,
            ha="right" if left else "left",
            va="center",
            size=10,
        )


def _levels(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Returns a level for each span, so that none touches another of its level."""
    ends: list[float] = []
    found = []
    for first, last in spans:
        free = next((n for n, end in enumerate(ends) if end < first), len(ends))
        ends[free:] = [last, *ends[free + 1 :]]
        found.append(free)
    return found
