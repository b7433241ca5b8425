"""Effective changes: what a delta does to the weights, parameter by parameter.

The effective change of a delta is what its folds make of the frozen parameters, less those
parameters. It belongs to the function that was trained and not to its factors: two LoRAs of one
change may have other A and B. Arithmetic on it is exact; arithmetic on factors has cross terms.

What a delta multiplies or normalises (DoRA, HiRA, OFT) is read on the frozen parameters alone. The
sum of two such changes is not the two deltas attached behind each other, where the second reads
what the first has made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.in_place import InPlaceBank
from deltatune.core.link import Link
from deltatune.core.method import Method
from deltatune.core.storage import Storage, storage_of

__all__ = [
    "Change",
    "Product",
    "add",
    "check_alike",
    "check_weights",
    "effective",
    "is_product",
    "transposes",
]


@dataclass(frozen=True)
class Product:
    """A difference kept as two factors: left [rows, rank] times right [rank, columns]."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.left.shape[1]

    @property
    def numel(self) -> int:
        """Entries of both factors."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Tensor:
        """The product, [rows, columns]."""
        return self.left @ self.right


class Change(Mapping[str, Tensor]):
    """The effective change of one delta, or what arithmetic made of several.

    A mapping of full parameter names ("encoder.block.0....q.weight") to differences in fp32, in the
    shape in which the module keeps the parameter. What is known as a product of two factors is
    multiplied when it is asked for, every time anew.

    `a + b`, `a - b`, `2 * a`, `-a` give changes.

    Args:
        model: whose parameters they are.
        parts: full name to difference, as a tensor or as a product.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Tensor | Product]) -> None:
        self.model = model
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        return part.dense() if isinstance(part, Product) else part

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __add__(self, other: Change) -> Change:
        return add([self, other])

    def __sub__(self, other: Change) -> Change:
        return add([self, other], [1.0, -1.0])

    def __neg__(self) -> Change:
        return add([self], [-1.0])

    def __mul__(self, weight: float) -> Change:
        return add([self], [weight])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        kept = sum(part.numel for part in self.parts.values() if isinstance(part, Product))
        kept += sum(part.numel() for part in self.parts.values() if isinstance(part, Tensor))
        return f"Change({len(self)} parameters, {kept:,} numbers kept)"


def effective(delta: Delta, slot: int = 0, *, methods: Collection[str] | None = None) -> Change:
    """What one slot of a delta does to the weights.

    Folds are computed in fp64 from the frozen parameters and returned in fp32, whatever else is
    attached or merged. Methods given by factors stay products.

    Args:
        delta: attached, detached or merged.
        slot: which of its deltas.
        methods: names of the methods of its expression to take; None for all of them.

    Raises:
        UnsupportedError: a part acts on activations and folds into no parameter, or is a head.
        UnknownNameError: `methods` names what the delta does not have.
        ConfigurationError: there is no such slot.
        StateError: it trained the backbone in place and is detached.
    """
    delta.check_slot(slot)
    taken = _taken(delta, methods)
    if isinstance(delta.bank, InPlaceBank):
        return Change(delta.model, _in_place(delta, delta.bank))
    by_module: dict[int, list[Link]] = {}
    for link in delta.links:
        if link.method.name in taken:
            by_module.setdefault(id(link.site.module), []).append(link)
    found: dict[str, Tensor | Product] = {}
    with torch.no_grad(), delta.route([slot]):
        for links in by_module.values():
            found |= _of_module(links, slot)
    return Change(delta.model, found)


def _taken(delta: Delta, methods: Collection[str] | None) -> set[str]:
    """The names of the methods to fold. Raises where one of them cannot be."""
    held = {part.method.name: part.method for part in delta.parts}
    for name in methods or ():
        if name not in held:
            raise UnknownNameError(f"method of {delta.name}", name, held)
    taken = set(held if methods is None else methods)
    for name in sorted(taken):
        reason = _reason(held[name])
        if reason is not None:
            rest = [repr(other) for other in held if _reason(held[other]) is None]
            way = f"Take the rest alone: methods=[{', '.join(rest)}]. " if rest else ""
            raise UnsupportedError(
                f"{name}, a part of {delta.name}, {reason}. {way}"
                "Deltas of one expression and one start can be averaged by their leaves: soup()."
            )
    return taken


def _reason(method: Method) -> str | None:
    """Why a method has no effective change; None where it has one."""
    if method.category == "head":
        return "replaces the classifier whatever stood there, so that no difference is meant"
    if method.face not in ("weight", "select"):
        return "acts on activations and folds into no parameter, so that it has no effective change"
    return None


def _in_place(delta: Delta, bank: InPlaceBank) -> dict[str, Tensor]:
    """What full fine-tuning changed; a tied parameter under each of its names."""
    if not delta.attached:
        raise StateError(
            f"{delta.name} is detached, and the backbone is as it was. Take its change before."
        )
    moved = {
        id(now): (now.detach() - before).float()
        for now, before in zip(bank.slots, bank.before, strict=True)
    }
    return {
        name: moved[id(parameter)]
        for name, parameter in delta.model.named_parameters(remove_duplicate=False)
    }


def _of_module(links: Sequence[Link], slot: int) -> Mapping[str, Tensor | Product]:
    """The change of one module's parameters."""
    weighing = [link for link in links if link.method.face == "weight"]
    selecting = [link for link in links if link.method.face == "select"]
    if all(is_product(link.method) for link in weighing) and not any(
        "weight" in link.forms for link in selecting
    ):
        product = {f"{links[0].site.path}.weight": _product(weighing, slot)} if weighing else {}
        return {**product, **_folded(selecting, slot)}
    return _folded(links, slot)


def _folded(links: Sequence[Link], slot: int) -> dict[str, Tensor]:
    """What folds make of one module's frozen parameters, less those."""
    if not links:
        return {}
    site, device = links[0].site, links[0].delta.bank.slots[slot].device
    base = {
        name: site.value(name).detach().to(device, torch.float64)
        for name in set[str]().union(*(link.touched for link in links))
        if site.parameters.get(name) is not None
    }
    values: dict[str, Tensor | None] = dict(base)
    with torch.autocast(device.type, enabled=False):
        for link in links:
            values = link.fold(values, base, link.leaves(slot, torch.float64))
    selected = {name for link in links for name in link.forms}
    found: dict[str, Tensor] = {}
    for name, value in sorted(values.items()):
        if value is None or value is base.get(name):
            continue
        difference = value - base[name] if name in base else value
        # The weight face hands every bias on, and a slice of a fused one as a copy.
        if name in selected or name == "weight" or difference.any():
            found[f"{site.path}.{name}"] = difference.float()
    return found


def is_product(method: Method) -> bool:
    """Whether the change of a weight is the product of the method's factors."""
    return method.has_factors() and type(method).weight is Method.weight


def _product(links: Sequence[Link], slot: int) -> Product:
    """The weight's change as one product, the ranks of all links side by side."""
    storage = storage_of(links[0].site.module)
    _, outputs = storage.widths(links[0].site.module)
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for link in links:
        A, B = link.method.factors(link.leaves(slot))
        B = link.method.strength * B
        whole = B.new_zeros(outputs, B.shape[1])
        whole[slice(*(link.site.rows or (None, None)))] = B
        As.append(A)
        Bs.append(whole)
    A, B = torch.cat(As), torch.cat(Bs, dim=1)
    return Product(A.mT.clone(), B.mT) if transposes(storage) else Product(B, A)


def transposes(storage: Storage) -> bool:
    """Whether a module keeps its weight as (in, out)."""
    return storage.view(torch.empty(1, 2, device="meta")).shape == (2, 1)


def add(changes: Sequence[Change], weights: Sequence[float] | None = None) -> Change:
    """Σ w_i Δ_i, task arithmetic; a negative weight takes away what a delta has learnt.

    Ilharco et al. 2023, arXiv:2212.04089. Sums of products stay products, of the sum of their
    ranks, as long as those are smaller than the dense difference. A parameter that one of the
    changes leaves alone counts as zero there.

    Args:
        changes: of one model.
        weights: one for each; None for ones.

    Raises ConfigurationError for changes of different models, or weights that do not fit.
    """
    model = check_alike(changes)
    factors = check_weights(weights, len(changes))
    names = dict.fromkeys(name for change in changes for name in change)
    return Change(
        model,
        {
            name: _sum(
                [(w, c.parts[name]) for w, c in zip(factors, changes, strict=True) if name in c]
            )
            for name in names
        },
    )


def _sum(terms: Sequence[tuple[float, Tensor | Product]]) -> Tensor | Product:
    """A weighted sum; a product where all are products and the sum is smaller so."""
    products = [(weight, part) for weight, part in terms if isinstance(part, Product)]
    if len(products) == len(terms):
        left = torch.cat([weight * part.left for weight, part in products], dim=1)
        found = Product(left, torch.cat([part.right for _, part in products]))
        if found.numel < found.left.shape[0] * found.right.shape[1]:
            return found
    total: Tensor | None = None
    for weight, part in terms:
        term = weight * (part.dense() if isinstance(part, Product) else part)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def check_alike(changes: Sequence[Change]) -> nn.Module:
    """The model that all changes are of. Raises ConfigurationError if there are several or none."""
    if not changes:
        raise ConfigurationError("Arithmetic needs at least one change; none was given.")
    model = changes[0].model
    if any(change.model is not model for change in changes):
        raise ConfigurationError(
            "The changes belong to different models, and their sum to none. Load all deltas onto "
            "one model, which verifies that they were made for it."
        )
    return model


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight for each of `count`; ones where none are given."""
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ConfigurationError(
            f"{count} terms need as many finite weights; {list(weights or ())} were given."
        )
    return found
