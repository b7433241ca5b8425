"""The virtual tokens of a link, row by row: what prefixes and prompts have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.core.link import Link
from deltatune.core.method import Leaves
from deltatune.core.rows import by_slot
from deltatune.core.text import Text

__all__ = ["count_of", "tokens_for", "tokens_of"]


def tokens_of(
    link: Link, size: int, dtype: torch.dtype, pair: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What the face gives each of `size` rows, [rows, tokens, width] each, and which rows have it
    (None: all).
    """
    rows = link.rows(size)

    def made(p: Leaves) -> tuple[Tensor, ...]:
        return link.method.attend(p) if pair else (link.method.embed(p),)

    def of_slot(place: int) -> Leaves:
        return {name: leaf[place] for name, leaf in leaves.items()}

    # What makes tokens computes in fp32, so that the stored ones are those that it makes.
    leaves = link.stacked(torch.promote_types(dtype, torch.float32))
    if rows.uniform is not None:
        each = made(of_slot(0))
        return tuple(t.to(dtype).unsqueeze(0).expand(size, -1, -1) for t in each), None
    # Where no row has a delta, those of a slot stand in.
    found = [made(of_slot(place)) for place in range(len(rows.order))] or [made(link.leaves(0))]
    stacks = [torch.stack(parts).to(dtype) for parts in zip(*found, strict=True)]
    place = {slot: number for number, slot in enumerate(rows.order)}
    device = stacks[0].device
    index = torch.tensor([0 if s is None else place[s] for s in rows.slots], device=device)
    present = torch.tensor([s is not None for s in rows.slots], device=device)
    return tuple(stack[index] for stack in stacks), None if present.all() else present


def tokens_for(link: Link, x: Tensor, text: Text) -> tuple[Tensor, Tensor | None]:
    """As `tokens_of`, for a method whose virtual tokens depend on the embedded text x [rows,
    tokens, width].
    """
    rows, wide = link.rows(x.shape[0]), torch.promote_types(x.dtype, torch.float32)
    x, dtype = x.to(wide), x.dtype

    def made(x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        del y
        return link.method.embed_for(x, text, p)

    if rows.empty:
        found = made(x, x, text, link.leaves(0, wide))
    else:
        found = by_slot(made, rows, x, x, text, link.stacked(wide), None)
    if None not in rows.groups:
        return found.to(dtype), None
    return found.to(dtype), torch.tensor([s is not None for s in rows.slots], device=x.device)


def count_of(link: Link) -> int:
    """How many virtual tokens a prompt has."""
    p = link.leaves(0)
    if not link.method.embeds_for():
        return link.method.embed(p).shape[0]
    real = torch.ones(1, 1, dtype=torch.bool, device=next(iter(p.values())).device)
    x = torch.zeros(1, 1, link.site.inputs, device=real.device)
    return link.method.embed_for(x, Text(real, real, None, False), p).shape[1]
