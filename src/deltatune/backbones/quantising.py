"""Quantising a frozen backbone: its linear maps are replaced by ones that keep codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltatune.backbones.int8 import Int8Linear
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.host import host_of
from deltatune.core.quantised import Quantised
from deltatune.core.storage import storage_of
from deltatune.core.target import find_sites

__all__ = ["FORMATS", "quantise"]


def quantise(model: nn.Module, format: str, *, at: str = "block.linear") -> None:
    """Replaces linear maps of a frozen model by quantised ones, in place.

    Embeddings, norms, biases and the head stay as they are, and so do modules that transformers
    itself never quantises (the `wo` of T5).

    Args:
        model: a model in plain numbers, without deltas.
        format: "int8" (`Int8Linear`, on any device) or "nf4" (`Linear4bit` of bitsandbytes with
            quantised scales, as in QLoRA).
        at: the target of the maps to replace.

    Raises:
        UnknownNameError: there is no such format.
        StateError: deltas are attached, or a map is quantised already.
        UnsupportedError: the model is sharded or offloaded.
        ConfigurationError: the format needs a library that is not installed.
        TargetError: the target matches nothing that can be quantised.
    """
    if format not in FORMATS:
        raise UnknownNameError("format of quantised weights", format, FORMATS)
    if host_of(model) is not None:
        raise StateError("Deltas are attached to the model. Quantise it before attaching any.")
    wanted = {id(site.module) for site in find_sites(model, at, "weight")}
    left_out = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    paths: dict[int, list[str]] = {}  # of one module that stands in several places, all
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in wanted and not left_out & set(path.split(".")):
            paths.setdefault(id(module), []).append(path)
    if not paths:
        raise TargetError(f"transformers quantises nothing of {at!r}. Choose another target.")
    for same in paths.values():  # one after the other, so that the plain ones go as they are made
        made = _quantised(model.get_submodule(same[0]), same[0], FORMATS[format])
        for path in same:
            model.set_submodule(path, made)


def _quantised(
    module: nn.Module, path: str, make: Callable[[Tensor, nn.Parameter | None], nn.Module]
) -> nn.Module:
    storage = storage_of(module)
    if isinstance(storage, Quantised):
        raise StateError(f"{path} is kept as {storage.format(module)} already.")
    weight = (storage.dense(module) or (None,))[0]
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or hasattr(module, "_hf_hook"):
        raise UnsupportedError(
            f"{path} is sharded or offloaded. Quantise the model where it is loaded as a whole."
        )
    return make(weight, module._parameters.get("bias")).train(module.training)


def _nf4(weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "NF4 needs the package bitsandbytes, which is not installed. "
            "Install it with: pip install 'deltatune[quantised]'"
        ) from error
    if weight.is_meta:
        raise UnsupportedError("NF4 codes are made from weights, and this model has none yet.")
    outputs, inputs = weight.shape
    made: Any = Linear4bit(inputs, outputs, bias=False, quant_type="nf4", device="meta")
    # Else a forward in evaluation lays the codes out anew and rounds their scales to bf16.
    made.support_avx512bf16_for_cpu = False
    plain = Params4bit(weight.detach().contiguous(), quant_type="nf4", module=made)
    made.register_parameter("weight", plain.to(weight.device))  # which quantises it
    made.register_parameter("bias", bias)
    found: nn.Module = made
    return found


FORMATS: Mapping[str, Callable[[Tensor, nn.Parameter | None], nn.Module]] = {
    "int8": Int8Linear,
    "nf4": _nf4,
}
