"""How the rows of a step are laid out: cut into forward passes, and packed within one.

Both look at lengths alone. Which rows belong to a step is decided before, by the sampler.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from deltatune.core.errors import ConfigurationError
from deltatune.training.batch import row_length

__all__ = ["check_lengths", "cut", "pack"]


def cut(lengths: Sequence[int], tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Rows in parts that keep to a budget, the longest row first.

    Args:
        lengths: of the rows, in tokens.
        tokens: how many tokens a part may have; a longer row has a part of its own.
        packed: whether the padding of a part, to its longest row, is left out and costs nothing.

    Returns:
        The places of the rows in `lengths`, part by part.
    """
    parts: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        cost = lengths[row] if packed or not parts else lengths[parts[-1][0]]
        if not parts or cost > room:
            parts.append([])
            cost, room = lengths[row], tokens
        parts[-1].append(row)
        room -= cost
    return parts


def check_lengths(rows: Sequence[Any], tokens: int, *, owner: str, setting: str) -> None:
    """Raises ConfigurationError if a row alone has more tokens than one pass may have."""
    longest = max(map(row_length, rows), default=0)
    if longest > tokens:
        raise ConfigurationError(
            f"{owner} has a row of {longest} tokens, and one pass may have {tokens}. "
            f"Raise `{setting}` or truncate."
        )


def pack(lengths: Sequence[int], width: int, groups: Sequence[Hashable]) -> list[list[int]]:
    """First-fit-decreasing bin packing, then the narrowest bins that need no more of them.

    Args:
        lengths: of the rows, in tokens.
        width: how many tokens a bin may hold; it is raised to the longest row.
        groups: of the rows; a bin holds rows of one group.

    Returns:
        The places of the rows in `lengths`, bin by bin; the bins of one group follow each other.
    """
    widest = max(width, *lengths)
    found = _first_fit(lengths, widest, groups)
    lowest = max(*lengths, -(-sum(lengths) // len(found)))
    while lowest < widest:
        middle = (lowest + widest) // 2
        narrower = _first_fit(lengths, middle, groups)
        if len(narrower) <= len(found):
            found, widest = narrower, middle
        else:
            lowest = middle + 1
    return found


def _first_fit(lengths: Sequence[int], width: int, groups: Sequence[Hashable]) -> list[list[int]]:
    bins: dict[Hashable, list[list[int]]] = {group: [] for group in groups}
    room: dict[Hashable, list[int]] = {group: [] for group in groups}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        mine, left = bins[groups[row]], room[groups[row]]
        place = next((k for k, free in enumerate(left) if free >= lengths[row]), len(mine))
        if place == len(mine):
            mine.append([])
            left.append(width)
        mine[place].append(row)
        left[place] -= lengths[row]
    return [held for one in bins.values() for held in one]
