"""A backbone with a delta written into its weights, as a checkpoint that needs no deltatune.

What other programs serve (vLLM, SGLang, converters to GGUF) is a folder of transformers. It is
written from a merged model and read again, and both are computed on the same inputs: the report
says how far they are apart.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import ArtefactError, StateError, UnsupportedError
from deltatune.core.in_place import InPlaceBank

__all__ = ["Parity", "write"]


@dataclass(frozen=True)
class Parity:
    """How the outputs of a checkpoint differ from those of the backbone with its delta.

    Attributes:
        entries: how many output numbers were compared.
        largest: of their magnitudes, before.
        difference: the largest between a number and the one that was there before.
        agreement: the share of positions whose largest output is the same one.
    """

    entries: int
    largest: float
    difference: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.entries:,} outputs up to {self.largest:.4g} differ by at most "
            f"{self.difference:.2g}; the largest of each position is the same in "
            f"{self.agreement:.2%}"
        )


def write(
    delta: Delta,
    folder: str | Path,
    inputs: Mapping[str, Tensor],
    *,
    slot: int = 0,
    tokenizer: Any = None,
    shard: str = "5GB",
) -> Parity:
    """Writes the model with one slot of a delta in its weights, and compares it with the live one.

    Nothing is at `folder` before all of it is. The model is left as it was. Beside the model in
    memory there is a second one while they are compared.

    Args:
        delta: attached to a model of transformers, and alone on it.
        folder: where it is written.
        inputs: keyword arguments of the model, real text: what both are computed on.
        slot: which of its slots.
        tokenizer: written beside it, if it is given.
        shard: the most that one file holds.

    Raises:
        UnsupportedError: a part acts on activations and cannot be written into weights
            (`deltatune.composition` cuts a LoRA out of what can), or the model is none of
            transformers.
        StateError: another delta is attached, or this one is detached or merged.
        ArtefactError: the folder exists, or cannot be written.
    """
    model: Any = delta.model
    if getattr(model, "config_class", None) is None:
        raise UnsupportedError(
            f"{type(model).__name__} is no model of transformers, so that nothing else could read "
            "the checkpoint. Share the delta itself, or train it on a class of transformers."
        )
    if not delta.attached or delta.merged or len(deltas_of(model)) > 1:
        raise StateError(
            f"{delta.name} must be attached, not merged, and alone on its model: what else acts "
            "there would be missing from the checkpoint, or be in it twice."
        )
    target = Path(folder)
    if target.exists():
        raise ArtefactError(f"{target} exists. Choose another folder.")
    size = next(iter(inputs.values())).shape[0]
    with delta.route([slot] * size):
        before = _outputs(model, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _written(delta, slot):
            model.save_pretrained(part, max_shard_size=shard)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        again = type(model).from_pretrained(part, dtype=model.dtype, local_files_only=True)
        again.to(model.device)
        found = _compared(before, _outputs(again, inputs))
        part.chmod(0o755)
        part.rename(target)
    except OSError as error:
        raise ArtefactError(f"Cannot write the checkpoint to {target}: {error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


@contextmanager
def _written(delta: Delta, slot: int) -> Iterator[None]:
    """Within it the weights are those with the delta; what trains in place has changed them."""
    if isinstance(delta.bank, InPlaceBank):
        yield
        return
    delta.merge(slot)
    try:
        yield
    finally:
        delta.unmerge()


def _outputs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, or the last hidden states of a model without a head, in evaluation."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            made = model(**inputs)
    finally:
        model.train(was_training)
    found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
    return found.float()


def _compared(before: Tensor, after: Tensor) -> Parity:
    return Parity(
        entries=before.numel(),
        largest=float(before.abs().max()),
        difference=float((before - after).abs().max()),
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )
