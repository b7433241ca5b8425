"""Plans: what attaching would do, before anything is changed. Works without weights, on the `meta`
device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltatune.core.grammar import Expression
from deltatune.core.layout import layout
from deltatune.core.quantised import base_bytes, count_parameters

__all__ = ["Memory", "Plan", "PlannedSite", "plan"]


@dataclass(frozen=True)
class PlannedSite:
    """One site of a plan.

    Attributes:
        method: the method's name.
        name: the site's name; path: that of the module whose call changes.
        shapes: leaf name to shape.
        count: trained entries that this site adds; a tied leaf counts at its first site.
    """

    method: str
    name: str
    path: str
    shapes: dict[str, tuple[int, ...]]
    count: int


@dataclass(frozen=True)
class Memory:
    """Static bytes of a training run, without activations.

    Attributes:
        base: the backbone as it is kept, codes with their scales. delta: fp32 leaves.
        gradients: of them. optimiser: AdamW's moments.
        snapshot: the copy that a control trained in place keeps of the backbone.
    """

    base: int
    delta: int
    gradients: int
    optimiser: int
    snapshot: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.base + self.delta + self.gradients + self.optimiser + self.snapshot


@dataclass(frozen=True)
class Plan:
    """What a delta is on a model.

    Attributes:
        method: the expression. trainable: trained entries. stored: entries of its artefact.
        shared: of the trained entries, those that the slots of a bank may have in common.
        base: distinct parameters of the backbone. sites: where it acts. memory: static bytes.
    """

    method: str
    trainable: int
    stored: int
    base: int
    sites: tuple[PlannedSite, ...]
    memory: Memory
    shared: int = 0

    @property
    def ratio_base(self) -> float:
        """trainable / base."""
        return self.trainable / self.base

    @property
    def ratio_total(self) -> float:
        """trainable / (base + trainable)."""
        return self.trainable / (self.base + self.trainable)


def plan(model: nn.Module, expression: Expression) -> Plan:
    """Plans an expression on a model. Raises what `layout` raises."""
    parts = layout(model, expression)
    trainable = sum(leaf.count for part in parts for leaf in part.leaves.values() if leaf.trained)
    kept = Expression(tuple(method.stored() for method in expression.methods))
    stored = sum(leaf.count for part in layout(model, kept) for leaf in part.leaves.values())
    sites, seen = [], set[str]()
    for part in parts:
        for site, names in zip(part.sites, part.names, strict=True):
            new = [part.leaves[full] for full in names.values() if full not in seen]
            seen |= set(names.values())
            shapes = {leaf: part.leaves[full].shape for leaf, full in names.items()}
            count = sum(leaf.count for leaf in new if leaf.trained)
            sites.append(PlannedSite(part.method.name, site.name, site.path, shapes, count))
    in_place = expression.in_place
    held = base_bytes(model)
    memory = Memory(
        base=held,
        delta=0 if in_place else 4 * trainable,
        gradients=held if in_place else 4 * trainable,
        optimiser=2 * (held if in_place else 4 * trainable),
        snapshot=held if in_place else 0,
    )
    base = count_parameters(model)
    shared = sum(
        leaf.count
        for part in parts
        for name, leaf in part.leaves.items()
        if leaf.trained and name.rpartition("/")[2] in part.method.shared_leaves
    )
    return Plan(str(expression), trainable, stored, base, tuple(sites), memory, shared)
