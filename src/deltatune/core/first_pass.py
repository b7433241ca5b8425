"""First passes: a token stack without a delta, before it runs with it.

A mixer may weigh its members by what the backbone alone makes of the text. While a decoder goes on
token by token the first pass reads the whole text again: what it needs of earlier tokens, their ids
and positions, lies in layers of the model's own cache (`core.shown`), so that beams and cuts take
it along, and its own keys and values are not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.core.shown import remember

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

__all__ = ["first_pass"]

_SO_FAR = ("input_ids", "inputs_embeds", "position_ids")  # arguments that tell of new tokens alone
_OF_CACHES = ("past_key_values", "cache_position", "use_cache")


@torch.no_grad()
def first_pass(
    stack: Callable[..., Any],
    given: Mapping[str, Any],
    deltas: Iterable[Delta],
    blocks: int,
    owner: int,
) -> Tensor:
    """The last hidden states of the new tokens, [rows, tokens, width], without a graph.

    Args:
        stack: its call.
        given: the arguments of the call under way, by name.
        deltas: those that are switched off.
        blocks: layers that the model itself has in a cache.
        owner: for whom the cache keeps what was read.

    Raises StateError if the cache was filled without the deltas.
    """
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    kept = {name: value for name, value in given.items() if name not in _OF_CACHES}
    for number, name in enumerate(_SO_FAR):
        if isinstance(kept.get(name), Tensor):
            kept[name] = _so_far(cache, blocks, owner + number, past, kept[name])
    tokens = next(given[name].shape[1] for name in _SO_FAR if given.get(name) is not None)
    with contextlib.ExitStack() as off:
        for delta in dict.fromkeys(deltas):
            off.enter_context(delta.active(False))
        output = stack(**kept, use_cache=False)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return hidden[:, -tokens:]


def _so_far(cache: Any, blocks: int, owner: int, past: int, new: Tensor) -> Tensor:
    """An argument [rows, tokens, ...] for all tokens so far."""
    wide = new.unsqueeze(-1) if new.dim() == 2 else new
    held = remember(cache, blocks, owner, past, wide)
    return held.squeeze(-1) if new.dim() == 2 else held
