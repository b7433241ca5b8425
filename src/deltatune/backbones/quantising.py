"""Quantising a frozen backbone: its linear maps are replaced by ones that keep codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbones.int8 import Int8Linear
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.host import host_of
from deltatune.core.quantised import Factors, Quantised, Rows, keep_error
from deltatune.core.storage import storage_of, wide
from deltatune.core.target import find_sites
from deltatune.core.whole import is_sharded

__all__ = ["FORMATS", "quantise"]


def quantise(
    model: nn.Module,
    format: str,
    *,
    at: str = "block.linear",
    error_rank: int = 0,
    error_rounds: int = 1,
) -> None:
    """Replaces linear maps of a frozen model by quantised ones, in place.

    Embeddings, norms, biases and the head stay as they are, and so do modules that transformers
    itself never quantises (the `wo` of T5).

    Args:
        model: a model in plain numbers, without deltas.
        format: "int8" (`Int8Linear`, on any device) or "nf4" (`Linear4bit` of bitsandbytes with
            quantised scales, as in QLoRA).
        at: the target of the maps to replace.
        error_rank: so many of the largest singular triplets of W - Q(W) are kept beside each map,
            in fp32 on the CPU, for `loftq` to begin with. The codes are the same.
        error_rounds: above 1 the codes become those of W - B A, B A the triplets kept, which then
            are those of W - Q(W - B A), and so on: LoftQ's alternation.

    Raises:
        UnknownNameError: there is no such format.
        StateError: deltas are attached, or a map is quantised already.
        UnsupportedError: the model is sharded or offloaded.
        ConfigurationError: the format needs a library that is not installed, or there is no such
            rank or number of rounds.
        TargetError: the target matches nothing that can be quantised.
    """
    if format not in FORMATS:
        raise UnknownNameError("format of quantised weights", format, FORMATS)
    if error_rank < 0 or error_rounds < 1 or (error_rounds > 1 and not error_rank):
        raise ConfigurationError(
            "error_rank is 0 or more, and error_rounds at least 1, above that only with a rank; "
            f"found error_rank={error_rank}, error_rounds={error_rounds}."
        )
    if host_of(model) is not None:
        raise StateError("Deltas are attached to the model. Quantise it before attaching any.")
    wanted: dict[int, list[Rows]] = {}  # of each module: all of it, or its slices
    for site in find_sites(model, at, "weight"):
        wanted.setdefault(id(site.module), []).append(site.rows)
    left_out = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    paths: dict[int, list[str]] = {}  # of one module that stands in several places, all
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in wanted and not left_out & set(path.split(".")):
            paths.setdefault(id(module), []).append(path)
    if not paths:
        raise TargetError(f"transformers quantises nothing of {at!r}. Choose another target.")
    for same in paths.values():  # one after the other, so that the plain ones go as they are made
        module = model.get_submodule(same[0])
        weight, bias = _plain(module, same[0])
        made, kept = FORMATS[format](weight, bias), dict[Rows, Factors]()
        for _ in range(error_rounds if error_rank and not weight.is_meta else 0):
            made = FORMATS[format](_spared(weight, kept), bias) if kept else made
            kept = {rows: _lost(weight, made, rows, error_rank) for rows in wanted[id(module)]}
        keep_error(made, kept)
        made.train(module.training)
        for path in same:
            model.set_submodule(path, made)


def _plain(module: nn.Module, path: str) -> tuple[Tensor, nn.Parameter | None]:
    """The weight (out, in) of a map and its bias. Raises StateError or UnsupportedError."""
    storage = storage_of(module)
    if isinstance(storage, Quantised):
        raise StateError(f"{path} is kept as {storage.format(module)} already.")
    weight = (storage.dense(module) or (None,))[0]
    if not isinstance(weight, Tensor) or is_sharded(weight) or hasattr(module, "_hf_hook"):
        raise UnsupportedError(
            f"{path} is sharded or offloaded. Quantise the model where it is loaded as a whole."
        )
    return weight, module._parameters.get("bias")


@torch.no_grad()
def _lost(weight: Tensor, made: nn.Module, rows: Rows, rank: int) -> Factors:
    """A and B of the largest singular triplets of what the codes of some rows lack."""
    storage = storage_of(made)
    assert isinstance(storage, Quantised)
    error = wide(weight) - storage.dequantise(made, torch.float32)
    U, S, V = torch.linalg.svd(error[_slice(rows)].cpu(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


@torch.no_grad()
def _spared(weight: Tensor, kept: Mapping[Rows, Factors]) -> Tensor:
    """The weight without what is kept beside its codes."""
    left = wide(weight).clone()
    for rows, (A, B) in kept.items():
        left[_slice(rows)] -= (B @ A).to(left.device)
    return left.to(weight.dtype)


def _slice(rows: Rows) -> slice:
    return slice(None) if rows is None else slice(*rows)


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
