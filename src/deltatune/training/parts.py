"""How the rows of a step are laid out: cut into forward passes, and packed within one.

Both look at lengths alone. Which rows belong to a step is decided before, by the sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltatune.core.errors import ConfigurationError
from deltatune.training.batch import row_length

__all__ = ["check_lengths", "cut", "pack"]


# What a pass on a CPU costs beside its tokens, in tokens: the time of a step of BERT-base (LoRA,
# fp32, one core) grows by 2.4 ms a token from 83 to 94 ms. Elsewhere a pass is dear, and few are
# best.
_CPU_PASS = 32


def cut(
    lengths: Sequence[int],
    tokens: int,
    *,
    packed: bool = False,
    device: torch.device | None = None,
) -> list[list[int]]:
    """Rows in parts that keep to a budget, the longest row first, where they cost least.

    Args:
        lengths: of the rows, in tokens.
        tokens: how many tokens a part may have; a longer row has a part of its own.
        packed: whether the padding of a part, to its longest row, is left out and costs nothing.
        device: where the parts are computed, which says what one more of them costs; None: as many
            tokens as it may have, so that there are as few as there can be.

    Returns:
        The places of the rows in `lengths`, part by part.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    on_cpu = device is not None and device.type == "cpu"
    ends = _ends(
        np.array([lengths[row] for row in rows], dtype=np.int64),
        tokens,
        _CPU_PASS if on_cpu else tokens,
        packed,
    )
    return [rows[start:end] for start, end in itertools.pairwise([0, *ends])]


def _ends(lengths: NDArray[np.int64], tokens: int, each: int, packed: bool) -> list[int]:
    """Where parts of falling lengths end, so that their tokens and `each` for every part come to
    the least.
    """
    count = len(lengths)
    whole = np.concatenate([[0], np.cumsum(lengths)])
    least, begins = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        starts = np.arange(end)
        held = whole[end] - whole[:end] if packed else lengths[:end] * (end - starts)
        fits = (held <= tokens) | (starts == end - 1)
        costs = np.where(fits, least[:end] + held + each, np.inf)
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    ends = [count]
    while begins[ends[-1]]:
        ends.append(int(begins[ends[-1]]))
    return ends[::-1] if count else []


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
