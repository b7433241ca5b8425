"""Where the names of points go, so that they cover neither each other nor what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Box", "Spot", "placed"]

# To the right, left, above and below; then the corners. The nearest first.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
GAPS = (7.0, 18.0, 32.0, 48.0, 68.0)


class Box(NamedTuple):
    """A rectangle along the axes, in pixels."""

    left: float
    lower: float
    right: float
    upper: float


class Spot(NamedTuple):
    """Where a name goes.

    Attributes:
        box: that it fills.
        near: whether it is known as the name of its point without a line between them.
        covered: area of the box on others or outside, square pixels.
    """

    box: Box
    near: bool
    covered: float


def placed(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    drawn: Iterable[Box],
    inside: Box,
) -> list[Spot]:
    """Returns a spot for the name of each point, one after the other, where it covers least.

    Args:
        points: (x, y).
        sizes: width and height of each name.
        drawn: what is there already.
        inside: the limits.
    """
    taken = list(drawn)
    spots = []
    for point, size in zip(points, sizes, strict=True):
        tried = [
            Spot(box, number < len(DIRECTIONS), _covered(box, taken, inside))
            for number, box in enumerate(_around(*point, *size))
        ]
        best = min(tried, key=lambda spot: spot.covered)  # the first of equals
        taken.append(best.box)
        spots.append(best)
    return spots


def _around(x: float, y: float, width: float, height: float) -> Iterable[Box]:
    for gap in GAPS:
        for across, up in DIRECTIONS:
            left = x - width / 2 + across * (width / 2 + gap)
            lower = y - height / 2 + up * (height / 2 + gap)
            yield Box(left, lower, left + width, lower + height)


def _covered(box: Box, taken: Iterable[Box], inside: Box) -> float:
    outside = (box.right - box.left) * (box.upper - box.lower) - _common(box, inside)
    # Rounded: what is left of sums that cancel is nothing.
    return round(outside + sum(_common(box, other) for other in taken), 3)


def _common(one: Box, other: Box) -> float:
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.upper, other.upper) - max(one.lower, other.lower)
    return max(width, 0.0) * max(height, 0.0)
