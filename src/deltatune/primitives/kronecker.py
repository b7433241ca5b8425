"""Kronecker products: how a width is cut into two factors."""

from __future__ import annotations

import math

from deltatune.core.errors import TargetError
from deltatune.core.site import Site

__all__ = ["cut", "divisors"]


def divisors(width: int) -> list[int]:
    """The divisors of a width, rising."""
    low = [d for d in range(1, math.isqrt(width) + 1) if width % d == 0]
    return sorted({*low, *(width // d for d in low)})


def cut(width: int, factor: int, method: str, site: Site) -> tuple[int, int]:
    """(smaller, larger) with smaller * larger = width.

    Args:
        width: of what is cut.
        factor: one of the two; 0: those nearest to each other.
        method, site: what is told in the error.

    Raises TargetError if the factor does not divide the width.
    """
    if factor == 0:
        factor = max(d for d in divisors(width) if d * d <= width)
    if factor < 0 or width % factor:
        raise TargetError(
            f"{method}: {factor} does not divide a width of {width} at {site.path}. Choose one of "
            f"{', '.join(map(str, divisors(width)))}, or 0 for the factors nearest to each other."
        )
    return min(factor, width // factor), max(factor, width // factor)
