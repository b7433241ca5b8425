"""What tokens have shown to later ones, kept as one more layer of the model's own cache.

A method that lets tokens read each other needs, when a decoder goes on token by token, what the
earlier ones showed. As a layer of the cache it is put in the order of beams, cut and repeated with
all others, and it is gone with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import StateError

__all__ = ["remember"]


class _Shown:
    """A layer of a cache that holds [rows, tokens, width]. It has the methods of transformers'."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.held: Tensor | None = None

    def get_seq_length(self) -> int:
        """How many tokens it holds."""
        return 0 if self.held is None else self.held.shape[1]

    def get_max_length(self) -> int:
        """It has no greatest length."""
        return -1

    def update(self, new: Tensor) -> Tensor:
        """Adds tokens; returns all."""
        self.held = new if self.held is None else torch.cat([self.held, new], dim=1)
        return self.held

    def reset(self) -> None:
        """Forgets all tokens."""
        self.held = None

    def offload(self) -> None:
        """It stays where it is."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, of which the number is given as a negative one."""
        if self.held is not None and tokens_to_remove:
            self.held = self.held[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes other rows."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes other rows."""
        if self.held is not None:
            self.held = self.held[indices.to(self.held.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.held is not None:
            self.held = self.held.repeat_interleave(repeats, dim=0)


def remember(cache: Any, blocks: int, owner: int, past: int, new: Tensor) -> Tensor:
    """What all tokens so far have shown, [rows, past + tokens, width].

    Args:
        cache: of the call, None if there is none.
        blocks: layers that the model itself has in it.
        owner: who shows.
        past: tokens that the cache holds.
        new: [rows, tokens, width].

    Raises StateError if the cache was filled without the owner.
    """
    if cache is None:
        return new
    cache = getattr(cache, "self_attention_cache", cache)
    layers: list[Any] = cache.layers
    layer = next((one for one in layers if isinstance(one, _Shown) and one.owner == owner), None)
    if layer is None:
        # The model's own layers come first: it finds them by their number.
        while len(layers) < blocks and cache.layer_class_to_replicate is not None:
            layers.append(cache.layer_class_to_replicate())
        layer = _Shown(owner)
        layers.append(layer)
    if layer.get_seq_length() != past:
        raise StateError(
            f"This cache holds {past} tokens, and {layer.get_seq_length()} of them were read with "
            "this delta. Start with an empty cache after a delta is attached, switched or "
            "detached, and give it to the first call already."
        )
    return layer.update(new)
