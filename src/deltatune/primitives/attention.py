"""Small attentions of a method's own: what tokens show is queries, keys and values side by side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend", "attend_to"]


def attend(shown: Tensor, sees: Tensor, heads: int) -> Tensor:
    """What new tokens read from those that they see, [..., tokens, m].

    Args:
        shown: [..., past + tokens, 3 m], queries, keys and values; m is divided among the heads.
        sees: [..., tokens, past + tokens] bool, each new token at least one.
        heads: how many.
    """
    q, k, v = shown.chunk(3, dim=-1)
    return attend_to(q[..., -sees.shape[-2] :, :], k, v, sees, heads)


def attend_to(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, heads: int) -> Tensor:
    """What tokens read from others, [..., tokens, m].

    Args:
        q: [..., tokens, m].
        k, v: [..., others, m].
        sees: [..., tokens, others] bool, each token at least one.
        heads: how many m is divided among.
    """
    parts = (torch.unflatten(part, -1, (heads, -1)) for part in (q, k, v))
    q, k, v = (part.transpose(-3, -2) for part in parts)
    read = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees.unsqueeze(-3))
    return read.transpose(-3, -2).flatten(-2)
