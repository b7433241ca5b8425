"""A backbone with a delta written into its weights, as a checkpoint that needs no deltatune.

What other programs serve (vLLM, SGLang, converters to GGUF) is a folder of transformers. It is
written from a merged model and read again, and both are computed on the same inputs: the report
says how far they are apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import ArtefactError, StateError, UnsupportedError
from deltatune.core.in_place import InPlaceBank
from deltatune.core.merging import Folds
from deltatune.core.probe import outputs_of
from deltatune.core.quantised import format_of
from deltatune.core.whole import whole_parameter
from deltatune.interop.shards import Shards

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

    Nothing is at `folder` before all of it is, and the model is left as it was. Beside the model
    in memory there is one file's content and one module's weights at a time: what was written is
    computed by transformers from the disk, on the processor.

    Args:
        delta: attached to a model of transformers, and alone on it.
        folder: where it is written.
        inputs: keyword arguments of the model, real text: what both are computed on.
        slot: which of its slots.
        tokenizer: written beside it, if it is given.
        shard: the most that one file holds.

    Raises:
        UnsupportedError: a part acts on activations and cannot be written into weights
            (`deltatune.composition` cuts a LoRA out of what can), the model is none of
            transformers, or its weights are not plain numbers in one process.
        StateError: another delta is attached, or this one is detached or merged.
        ArtefactError: the folder exists or cannot be written, or transformers does not find in it
            every weight that the model has, and no other.
    """
    model: Any = delta.model
    _check(delta)
    target = Path(folder)
    if target.exists():
        raise ArtefactError(f"{target} exists. Choose another folder.")
    values, shards = _Values(delta, slot), Shards(model, shard)
    size = next(iter(inputs.values())).shape[0]
    with delta.route([slot] * size):
        before = outputs_of(model, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as part:
            whole, scratch = Path(part) / "whole", Path(part) / "scratch"
            model.save_pretrained(whole, state_dict={})  # all but the weights
            shards.write(whole, values)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            found = _compared(before.cpu(), _computed(model, whole, scratch, inputs))
            whole.rename(target)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write the checkpoint to {target}: {error}.") from error
    return found


def _check(delta: Delta) -> None:
    """Raises UnsupportedError or StateError where a delta cannot be written."""
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
    kept = format_of(model) or getattr(model, "hf_quantizer", None)
    if kept is not None:
        raise UnsupportedError(
            f"The weights of this {type(model).__name__} are quantised; a checkpoint is written in "
            "plain numbers. Load the delta on the backbone in plain numbers "
            "(`across_formats=True`), and write that."
        )


class _Values:
    """The tensors of a model's state dict with one slot of a delta in them, one module at a time.

    What trains in place has changed the model's own.
    """

    def __init__(self, delta: Delta, slot: int) -> None:
        delta.check_slot(slot)
        self._model = delta.model
        self._folds = None if isinstance(delta.bank, InPlaceBank) else Folds(delta, slot)
        self._last: tuple[nn.Module, Mapping[str, Tensor]] = (delta.model, {})

    def __call__(self, name: str) -> Tensor:
        """The tensor of this name."""
        path, _, own = name.rpartition(".")
        module = self._model.get_submodule(path)
        if self._folds is not None and module is not self._last[0]:
            self._last = module, self._folds.of(module)
        value = self._last[1].get(own) if module is self._last[0] else None
        value = whole_parameter(module, own) if value is None else value
        assert value is not None
        return value.detach()


def _computed(model: Any, folder: Path, scratch: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """What transformers computes from a folder, each module's weights read when it is called.

    A model that reads a weight elsewhere than in its module (DeBERTa-v2 does) is loaded as a whole.

    Raises ArtefactError if a weight is missing or belongs to nothing.
    """
    given = {name: value.to("cpu") for name, value in inputs.items()}
    places = {"device_map": {"": "disk"}, "offload_folder": scratch}
    try:
        return outputs_of(_loaded(model, folder, **places), given)
    except NotImplementedError:  # the weight has no values there
        return outputs_of(_loaded(model, folder), given)


def _loaded(model: Any, folder: Path, **places: Any) -> Any:
    again, told = type(model).from_pretrained(
        folder, dtype=model.dtype, local_files_only=True, output_loading_info=True, **places
    )
    wrong = {key: sorted(map(str, names)) for key, names in told.items() if names}
    if wrong:
        raise ArtefactError(
            f"transformers does not load the checkpoint as {type(model).__name__}: {wrong}. "
            "Nothing was written."
        )
    return again


def _compared(before: Tensor, after: Tensor) -> Parity:
    return Parity(
        entries=before.numel(),
        largest=float(before.abs().max()),
        difference=float((before - after).abs().max()),
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )
