"""A prefix that starts as a text: the keys and values that the backbone makes of it.

The cache of a text, trained further, is a cartridge (Eyuboglu et al. 2025, arXiv:2506.06266). In a
decoder whose positions are rotary the start is exact: the logits of a text behind the prefix are
those of the text behind the other text, up to sliding windows, which never hide a prefix. With
learned positions the caller has to count on from the prefix (`position_ids`). With relative
positions, and in encoders, where the text would read on, the start is near and not exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune.backbones.virtual_tokens.attend import recording
from deltatune.core.calls import parameter_names
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError
from deltatune.core.positions import position_table

__all__ = ["start_from_text"]


@torch.no_grad()
def start_from_text(delta: Delta, input_ids: Tensor, *, slot: int = 0) -> None:
    """Writes the keys and values of a text into the prefix of one slot, by one forward pass.

    Args:
        delta: attached, with a `prefix` that is as long as the text.
        input_ids: token ids, [tokens] or [1, tokens]. An encoder-decoder gives them to its encoder.
        slot: which.

    Raises:
        ConfigurationError: the delta has no such prefix or slot, or the text does not reach it.
        StateError: the delta is not attached, or the model is in training mode.
    """
    delta.check_slot(slot)
    links = [link for link in delta.links if link.method.face == "attend"]
    if not links or any(set(link.names) != {"K", "V"} for link in links):
        raise ConfigurationError(
            f"{delta.name} has no plain keys and values that could start as those of a text. Use "
            "prefix, without reparameterise."
        )
    if not delta.attached or delta.model.training:
        raise StateError("Attach the delta and call model.eval(): dropout would change the text.")
    ids = input_ids.reshape(1, -1)
    with recording([link.site.module for link in links]) as kept, delta.active(False):
        _run(delta.model, ids)
    found: dict[str, Tensor] = {}
    for link in links:
        for leaf, states in zip(("K", "V"), kept.get(link.site.module, ()), strict=False):
            found[link.names[leaf]] = states[0].transpose(0, 1).flatten(1)
    held = delta.tensors(slot)
    for name in (name for link in links for name in link.names.values()):
        if name not in found or found[name].shape != held[name].shape:
            reached = "not at all" if name not in found else f"with {len(found[name])} tokens"
            raise ConfigurationError(
                f"The text of {ids.shape[1]} tokens reaches {name}, of {len(held[name])}, "
                f"{reached}. Make the prefix as long as the text; in an encoder-decoder give it "
                "at='encoder.self_attention'."
            )
    delta.bank.write(slot, held | found)
    delta.saved.pop(slot, None)


def _run(model: nn.Module, ids: Tensor) -> None:
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    stack: nn.Module = model.get_encoder() if both else model  # type: ignore[operator]
    places = {}
    if "position_ids" in parameter_names(stack) and position_table(stack) is None:
        # Rotary: what is turned back by its own length stands before a text that begins at 0.
        places["position_ids"] = torch.arange(-ids.shape[1], 0, device=ids.device)[None]
    stack(input_ids=ids, attention_mask=torch.ones_like(ids), **places)
