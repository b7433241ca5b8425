"""From a change back to a delta: products of low rank where they are smaller, else differences.

What comes out is an ordinary delta of the methods `lora` and `difference`: it routes, trains, saves
and merges as any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.composition.change import Change, Product, transposes
from deltatune.core.attaching import attach
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.grammar import Expression, build
from deltatune.core.storage import storage_of
from deltatune.core.whole import identity

__all__ = ["Composed", "as_delta", "expression_of", "write"]

_ROUNDING = 1e-6  # relative; fp32 differences of a low rank are full matrices below it


@dataclass(frozen=True)
class Composed:
    """A delta that arithmetic has made.

    Attributes:
        delta: attached, with one slot.
        errors: what was dropped of each parameter's difference, as a share of its Frobenius norm.
        error: what was dropped of the whole change, likewise.
    """

    delta: Delta
    errors: Mapping[str, float]
    error: float


@dataclass(frozen=True)
class _Truncated:
    product: Product
    dropped: float  # Frobenius norms
    whole: float


def as_delta(change: Change, *, rank: int | None = None) -> Composed:
    """Attaches a new delta that does what a change says.

    Every linear weight gets a `lora` of the smallest rank that leaves nothing but rounding (1e-6 of
    its norm), or of `rank` if that is smaller, by a truncated SVD, which is the nearest product of
    that rank. Biases, other parameters, and weights whose product would not be smaller get a
    `difference`. The deltas that the change was made from are left as they are: switch them off or
    detach them.

    Args:
        change: an effective change, or what arithmetic made of some.
        rank: the most that a weight may have; None for all that it needs.

    Raises:
        ConfigurationError: the rank is below 1, or the change names no parameter.
        UnsupportedError: it asks for two different differences of one tied parameter.
    """
    if rank is not None and rank < 1:
        raise ConfigurationError(f"rank must be at least 1, or None; it is {rank}.")
    if not change:
        raise ConfigurationError("The change names no parameter, so there is nothing to attach.")
    parts: dict[str, Tensor | Product] = {}
    ranks: dict[str, int | None] = {}
    dropped: dict[str, float] = {}
    wholes: dict[str, float] = {}
    tied = _tied(change)
    for name, part in change.parts.items():
        parts[name], ranks[name], dropped[name] = part, None, 0.0
        apart = _is_linear(change.model, name) and name not in tied
        cut = _truncated(part, rank) if apart else None
        if cut is not None and cut.product.numel < _entries(part):
            parts[name], ranks[name], dropped[name] = cut.product, cut.product.rank, cut.dropped
        wholes[name] = float(torch.linalg.vector_norm(change[name])) if cut is None else cut.whole
    delta = attach(change.model, expression_of(change.model, ranks))
    try:
        write(delta, Change(change.model, parts))
    except BaseException:
        delta.detach()
        raise
    return Composed(
        delta,
        {name: dropped[name] / wholes[name] if wholes[name] else 0.0 for name in parts},
        math.hypot(*dropped.values()) / (math.hypot(*wholes.values()) or 1.0),
    )


def expression_of(model: nn.Module, ranks: Mapping[str, int | None]) -> Expression:
    """`lora` for every parameter with a rank, `difference` for the others, few terms in all."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, rank in sorted(ranks.items()):
        path, _, own = name.rpartition(".")
        groups.setdefault((own, rank or 0), []).append(path)
    return Expression(
        tuple(
            build("lora", {"rank": rank, "alpha": float(rank), "at": _target(model, paths)})
            if rank
            else build("difference", {"parameters": own, "at": _target(model, paths)})
            for (own, rank), paths in sorted(groups.items())
        )
    )


def write(delta: Delta, change: Change, slot: int = 0) -> None:
    """Sets a slot of a delta that `expression_of` has shaped to a change.

    Products of fewer ranks than the slot has are filled up with zeros; larger ones and dense
    differences are cut to its rank.

    Raises UnsupportedError where two parameters share a leaf and differ.
    """
    values: dict[str, Tensor] = {}
    for part in delta.parts:
        for site, names in zip(part.sites, part.names, strict=True):
            if part.method.name == "lora":
                rank = part.leaves[names["A"]].shape[0]
                held = change.parts[f"{site.path}.weight"]
                if isinstance(held, Tensor) or held.rank > rank:
                    held = _truncated(held, rank).product
                flipped = transposes(storage_of(site.module))
                B, A = (held.right.mT, held.left.mT) if flipped else (held.left, held.right)
                missing = rank - held.rank
                values[names["A"]] = functional.pad(A, (0, 0, 0, missing))
                values[names["B"]] = functional.pad(B, (0, missing))
                continue
            for own, full in names.items():
                name = f"{site.path}.{own}"
                # A difference acts at every place that a tied parameter has.
                difference = change[name] if name in change else torch.zeros(site.shape(own) or ())
                if full in values and not values[full].equal(difference):
                    raise UnsupportedError(
                        f"{name} is tied to a parameter for which the change asks "
                        "something else. Compose deltas of one of the two places only."
                    )
                values[full] = difference
    delta.bank.write(slot, values)


def _tied(change: Change) -> set[str]:
    """The names of parameters that the change names twice, as they are tied."""
    names: dict[int, list[str]] = {}
    for name in change:
        path, _, own = name.rpartition(".")
        module = change.model.get_submodule(path)
        if module._parameters.get(own) is not None:
            names.setdefault(identity(module, own), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _is_linear(model: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own == "weight" and storage_of(model.get_submodule(path)).linear


def _entries(part: Tensor | Product) -> int:
    return part.numel() if isinstance(part, Tensor) else len(part.left) * part.right.shape[1]


def _truncated(part: Tensor | Product, rank: int | None) -> _Truncated:
    """The nearest product of at most `rank`, and of no more than rounding asks for.

    In fp64: singular values of fp32 noise would pass for ranks. Of a product only the cores of its
    factors are decomposed.
    """
    if isinstance(part, Product):
        Q, R = torch.linalg.qr(part.left.double())
        P, L = torch.linalg.qr(part.right.double().mT)
        U, S, V = torch.linalg.svd(R @ L.mT, full_matrices=False)
        U, V = Q @ U, V @ P.mT
        # Of factors that cancel each other, as those of a - a do, fp64 noise is left.
        S = S * (1e-12 * R.norm() * L.norm() < S)
    else:
        U, S, V = torch.linalg.svd(part.double(), full_matrices=False)
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r]: what rank r drops
    needed = int((tails > _ROUNDING * tails[0]).sum())
    kept = max(1, needed if rank is None else min(needed, rank))
    root = S[:kept].sqrt()
    product = Product((U[:, :kept] * root).float(), (root[:, None] * V[:kept]).float())
    return _Truncated(product, float(tails[kept]) if kept < len(S) else 0.0, float(tails[0]))


def _target(model: nn.Module, paths: list[str]) -> str:
    """A target that names these modules and no others, as short as one of three forms allows."""
    lasts = dict.fromkeys(re.escape(path.rpartition(".")[2]) for path in paths)
    shapes = dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(path)) for path in paths)
    named = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for pattern in (rf"(.*\.)?({'|'.join(lasts)})", "|".join(shapes)):
        if {name for name in named if re.fullmatch(pattern, name)} == set(paths):
            return f"re:{pattern}"
    return "re:" + "|".join(map(re.escape, paths))
