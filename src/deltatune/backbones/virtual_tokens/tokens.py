"""The virtual tokens of a link, row by row: what prefixes and prompts have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.core.link import Link

__all__ = ["tokens_of"]


def tokens_of(
    link: Link, size: int, dtype: torch.dtype, pair: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The virtual tokens of each of `size` rows, [rows, tokens, width], and which rows have them
    (None: all).
    """
    rows = link.rows(size)
    leaves = link.stacked(dtype)

    def made(slot: int) -> tuple[Tensor, ...]:
        p = {name: leaf[slot] for name, leaf in leaves.items()}
        return link.method.attend(p) if pair else (link.method.embed(p),)

    if rows.uniform is not None:
        return tuple(
            t.to(dtype).unsqueeze(0).expand(size, -1, -1) for t in made(rows.uniform)
        ), None
    used = [slot for slot in rows.groups if slot is not None] or [0]
    stacks = [torch.stack(parts).to(dtype) for parts in zip(*map(made, used), strict=True)]
    index = torch.tensor([used.index(s) if s is not None else 0 for s in rows.slots])
    present = torch.tensor([s is not None for s in rows.slots], device=stacks[0].device)
    return tuple(stack[index.to(stack.device)] for stack in stacks), (
        None if present.all() else present
    )
