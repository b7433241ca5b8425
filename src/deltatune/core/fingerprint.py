"""Fingerprints: which backbone a delta was made for.

Two tiers. The architecture is the ordered names and shapes of all tensors. The weights are every
byte of every distinct storage, hashed with xxh3-128 at the speed of memory, in their own dtype and
cast to bf16, so that one checkpoint loaded in fp32 or in bf16 is recognised. Any change of any
tensor is seen. The hash detects mistakes; it does not resist an adversary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deltatune.core.quantised import Quantised, format_of, shape_of
from deltatune.core.storage import storage_of
from deltatune.core.whole import is_sharded, kind_of, whole_parameter

__all__ = ["Fingerprint", "digest", "fingerprint", "vocabulary"]

_THREADS = 8  # more do not read memory faster


class Fingerprint(BaseModel):
    """What identifies a backbone.

    Attributes:
        kind: the class of the model.
        name: hub id or folder it was loaded from, as its config says; "" if unknown.
        revision: the hub commit, if there is one.
        parameters: distinct parameters.
        architecture: digest of names and shapes; those of plain numbers where it is quantised.
        dtype: of the weights; where two backbones differ in it, the bf16 digests are compared.
        weights: digest of the bytes; None on the `meta` device.
        weights_bf16: digest of the bytes after a cast to bf16; None on the `meta` device.
        excluded: paths of modules left out, because the delta brings them itself (heads).
        quantised: what its matrices are kept as ("int8", "nf4"); None for plain numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    name: str
    revision: str | None
    parameters: int
    architecture: str
    dtype: str
    weights: str | None
    weights_bf16: str | None
    excluded: tuple[str, ...] = ()
    quantised: str | None = None

    def tells(self, like: Fingerprint | None) -> bool:
        """Whether the digest is there that a comparison with `like` looks at; with None, both."""
        if like is None:
            return None not in (self.weights, self.weights_bf16)
        return (self.weights if self.dtype == like.dtype else self.weights_bf16) is not None

    def difference(self, other: Fingerprint, *, across_formats: bool = False) -> str | None:
        """What distinguishes `other` from this one, in words; None if they are one backbone.

        Args:
            other: what was found.
            across_formats: accept the same architecture kept in another format, whose weights
                cannot be compared with these.
        """
        if self.architecture != other.architecture:
            return (
                f"another architecture ({other.kind} with {other.parameters:,} parameters, "
                f"not {self.kind} with {self.parameters:,})"
            )
        if self.quantised != other.quantised:
            made_for, found = (one.quantised or "plain numbers" for one in (self, other))
            sentence = f"the same architecture kept as {found}, not as {made_for}"
            return None if across_formats else sentence
        same_dtype = self.dtype == other.dtype
        mine, theirs = (
            (self.weights, other.weights) if same_dtype else (self.weights_bf16, other.weights_bf16)
        )
        if None not in (mine, theirs) and mine != theirs:
            return (
                "the same architecture with other weights "
                f"({other.name or 'unnamed'}, not {self.name or 'unnamed'})"
            )
        return None


def fingerprint(
    model: nn.Module,
    *,
    originals: Mapping[str, Tensor] | None = None,
    excluded: Collection[str] = (),
    like: Fingerprint | None = None,
) -> Fingerprint:
    """The fingerprint of a model.

    Args:
        model: the model; deltas attached to it do not count.
        originals: frozen values of tensors that hold a merged delta just now, by name.
        excluded: paths of modules to leave out.
        like: what it is to be compared with. A digest that `difference` will not look at is left
            out, which takes most of the time; None: both are there.
    """
    held = _held(model, excluded)
    kept_as = format_of(model)
    architecture, counts = xxhash.xxh3_128(), dict[int, int]()
    for name, shape in _shapes(model, held, kept_as):
        architecture.update(f"{name}:{shape};".encode())
        counts[id(held[name])] = math.prod(shape)
    config = getattr(model, "config", None)
    dtype = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in held.values()}))
    found = Fingerprint(
        kind=kind_of(model).__name__,
        name=str(getattr(config, "_name_or_path", "") or ""),
        revision=getattr(config, "_commit_hash", None),
        parameters=sum(counts.values()),
        architecture=architecture.hexdigest(),
        dtype=dtype,
        weights=None,
        weights_bf16=None,
        excluded=tuple(sorted(excluded)),
        quantised=kept_as,
    )
    own = narrow = like is None
    if like is not None and like.difference(found, across_formats=True) is None:
        own, narrow = like.dtype == dtype, like.dtype != dtype
    weights, weights_bf16 = _digests(model, held, originals or {}, own, narrow)
    return found.model_copy(update={"weights": weights, "weights_bf16": weights_bf16})


def _held(model: nn.Module, excluded: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a model by name, as they lie: sharded or offloaded ones too."""
    state = model.state_dict(keep_vars=True)
    left_out = tuple(f"{path}." for path in excluded)
    return {name: state[name] for name in sorted(state) if not name.startswith(left_out)}


def _shapes(
    model: nn.Module, held: Mapping[str, Tensor], kept_as: str | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a model is in plain numbers: codes have no scales beside them."""
    modules = () if kept_as is None else model.named_modules(remove_duplicate=False)
    quantised = {
        path: module for path, module in modules if isinstance(storage_of(module), Quantised)
    }
    for name, tensor in held.items():
        path, _, own = name.rpartition(".")
        shape: tuple[int, ...] | None = tuple(tensor.shape)
        if path in quantised:
            shape = shape_of(quantised[path], own)
        elif name.partition(".weight.")[0] in quantised:  # as bitsandbytes names scales
            shape = None
        if shape is not None:
            yield name, shape


def _digests(
    model: nn.Module,
    held: Mapping[str, Tensor],
    originals: Mapping[str, Tensor],
    own: bool,
    narrow: bool,
) -> tuple[str | None, str | None]:
    """The digests of the values: in their own dtype, and cast to bf16; None for what is not wanted,
    and for a model whose values are not in memory.
    """
    if not (own or narrow):
        return None, None
    contents: dict[int, Future[tuple[str, str]]] = {}  # what is tied is read once
    modules = dict(model.named_modules(remove_duplicate=False))
    with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as pool:
        for name, tensor in held.items():
            if id(tensor) in contents:
                continue
            path, _, leaf = name.rpartition(".")
            value = originals.get(name)
            if value is None and path in modules:
                value = whole_parameter(modules[path], leaf)
            value = tensor if value is None else value  # a state dict may hold what no module does
            if value.is_meta:
                return None, None
            contents[id(tensor)] = pool.submit(_contents, value, own, narrow)
            if value is not tensor:  # gathered or fetched for this: one at a time
                contents[id(tensor)].result()
    found = xxhash.xxh3_128(), xxhash.xxh3_128()
    for name, tensor in held.items():
        for hashed, content in zip(found, contents[id(tensor)].result(), strict=True):
            hashed.update(f"{name}:{content};".encode())
    return found[0].hexdigest() if own else None, found[1].hexdigest() if narrow else None


def _contents(value: Tensor, own: bool, narrow: bool) -> tuple[str, str]:
    """The content as it is and as bf16; "" for what is not wanted."""
    with torch.no_grad():
        small = value.to(torch.bfloat16) if narrow and value.is_floating_point() else value
        return _content(value) if own else "", _content(small) if narrow else ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 of named tensors: names, shapes, dtypes and every byte."""
    found = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        found.update(f"{name}:{_content(tensor)};".encode())
    return found.hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """xxh3-128 of the tokens of a tokenizer of transformers with their numbers."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda one: (one[1], one[0]))
    return xxhash.xxh3_128_hexdigest("\0".join(f"{k}:{token}" for token, k in tokens).encode())


def _content(tensor: Tensor) -> str:
    """Shape, dtype and digest of every byte; of a tensor made of others (torchao's), theirs."""
    made: Any = tensor
    if is_traceable_wrapper_subclass(made) and not is_sharded(tensor):
        parts = made.__tensor_flatten__()[0]
        return ",".join(f"{name}:{_content(getattr(made, name))}" for name in parts)
    held: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)}:{tensor.dtype}:{xxhash.xxh3_128_hexdigest(held)}"
