"""The loss of every row of a batch, where rows belong to different runs.

A model's own loss is one mean over the whole batch. Summed over the rows and divided by the items,
what is computed here is that mean (tested on every family).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from deltatune.core.errors import UnsupportedError
from deltatune.training.batch import IGNORED

__all__ = ["inputs_without_loss", "row_losses"]


def inputs_without_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a forward that computes no loss: for a decoder on top of an encoder, with
    its input made from the labels.

    Raises UnsupportedError if such a model does not say how.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _both(model) and "decoder_input_ids" not in inputs:
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:
            raise UnsupportedError(
                f"{type(model).__name__} does not say how its decoder's input is made from labels. "
                "Give decoder_input_ids."
            )
        inputs["decoder_input_ids"] = prepare(labels=batch["labels"])
    return inputs


def row_losses(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """[rows], the sum of each row's losses over its items.

    Args:
        model: whose loss it is.
        logits: [rows, tokens, words], or [rows, classes] where a label is a row's; for values
            [rows, 1] or [rows, values].
        labels: [rows, tokens], -100 where there is none; or [rows] of classes or values.

    Raises UnsupportedError for labels of another form.
    """
    logits = logits.float()
    if labels.is_floating_point():
        values = logits.squeeze(-1) if labels.dim() < logits.dim() else logits
        squares = functional.mse_loss(values, labels.float(), reduction="none")
        return squares if squares.dim() == 1 else squares.mean(1)
    if labels.dim() == 1 and logits.dim() == 2:
        return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    if labels.dim() != 2 or logits.dim() != 3:
        raise UnsupportedError(
            f"Labels {tuple(labels.shape)} and logits {tuple(logits.shape)} are of no known loss."
        )
    if not _both(model):  # a decoder's logits are about the token that follows
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return each.view(labels.shape).sum(1)


def _both(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
