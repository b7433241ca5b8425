"""Fingerprints: which backbone a delta was made for.

Two tiers. The architecture is the ordered names and shapes of all tensors. The weights are every
byte of every distinct storage, hashed with xxh3-128 (about 0.3 s for 1e9 parameters), in their own
dtype and cast to bf16, so that one checkpoint loaded in fp32 or in bf16 is recognised. Any change
of any tensor is seen. The hash detects mistakes; it does not resist an adversary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

__all__ = ["Fingerprint", "digest", "fingerprint"]


class Fingerprint(BaseModel):
    """What identifies a backbone.

    Attributes:
        kind: the class of the model.
        name: hub id or folder it was loaded from, as its config says; "" if unknown.
        revision: the hub commit, if there is one.
        parameters: distinct parameters.
        architecture: digest of names and shapes.
        dtype: of the weights; where two backbones differ in it, the bf16 digests are compared.
        weights: digest of the bytes; None on the `meta` device.
        weights_bf16: digest of the bytes after a cast to bf16; None on the `meta` device.
        excluded: paths of modules left out, because the delta brings them itself (heads).
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

    def difference(self, other: Fingerprint) -> str | None:
        """What distinguishes `other` from this one, in words; None if they are one backbone."""
        if self.architecture != other.architecture:
            return (
                f"another architecture ({other.kind} with {other.parameters:,} parameters, "
                f"not {self.kind} with {self.parameters:,})"
            )
        known = None not in (self.weights, other.weights)
        same_dtype = self.dtype == other.dtype
        mine, theirs = (
            (self.weights, other.weights) if same_dtype else (self.weights_bf16, other.weights_bf16)
        )
        if known and mine != theirs:
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
) -> Fingerprint:
    """The fingerprint of a model.

    Args:
        model: the model; deltas attached to it do not count.
        originals: frozen values of tensors that hold a merged delta just now, by name.
        excluded: paths of modules to leave out.
    """
    tensors = list(_tensors(model, originals or {}, tuple(excluded)))
    architecture = xxhash.xxh3_128()
    for name, tensor in tensors:
        architecture.update(f"{name}:{tuple(tensor.shape)};".encode())
    config = getattr(model, "config", None)
    meta = any(tensor.is_meta for _, tensor in tensors)
    return Fingerprint(
        kind=type(model).__name__,
        name=str(getattr(config, "_name_or_path", "") or ""),
        revision=getattr(config, "_commit_hash", None),
        parameters=sum(tensor.numel() for tensor in {id(t): t for _, t in tensors}.values()),
        architecture=architecture.hexdigest(),
        dtype=", ".join(sorted({str(t.dtype).removeprefix("torch.") for _, t in tensors})),
        weights=None if meta else _digest(tensors, None),
        weights_bf16=None if meta else _digest(tensors, torch.bfloat16),
        excluded=tuple(sorted(excluded)),
    )


def _tensors(
    model: nn.Module, originals: Mapping[str, Tensor], excluded: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    state = model.state_dict(keep_vars=True)
    for name in sorted(state):
        if not any(name.startswith(f"{path}.") for path in excluded):
            yield name, originals.get(name, state[name])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 of named tensors: names, shapes, dtypes and every byte."""
    return _digest(list(tensors.items()), None)


def _digest(tensors: list[tuple[str, Tensor]], dtype: torch.dtype | None) -> str:
    found, seen = xxhash.xxh3_128(), set[tuple[int, tuple[int, ...]]]()
    for name, tensor in tensors:
        key = (tensor.data_ptr(), tuple(tensor.shape))
        cast = tensor.detach()
        if dtype is not None and cast.is_floating_point():
            cast = cast.to(dtype)
        found.update(f"{name}:{tuple(cast.shape)}:{cast.dtype};".encode())
        if key in seen:
            continue
        seen.add(key)
        content: Any = cast.cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()
