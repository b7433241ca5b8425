"""Diff pruning: W' = W + z ⊙ w, z the hard concrete gates of a sparse difference w.

Guo et al. 2021, arXiv:2012.07463. z = clip(3 σ(a + noise) - 1.5, 0, 1), a starting at 5, the noise
logistic and drawn in every step; evaluation goes without it. The penalty is that of L0, the
expected number of open gates. At the turn the share with the largest |z w| is kept, with z = 1, and
trained on with a fixed mask. Training takes more memory than full tuning; the product z w is
stored. The variant with a gate for each tensor is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf, constant
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.policy import Draws, Held, Moment
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site
from deltatune.primitives.pruning import best

_OPEN = 50.0  # a gate that noise does not move


@register("diff_pruning")
@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """A sparse difference that is pruned while it is trained.

    Attributes:
        share: of the entries that are kept, over all sites together.
        turn: the share of the budget of training before the others are cut.
        sparsity: weight of the expected number of open gates in the loss.
        gates: whether there are gates; what is stored is the difference alone.
    """

    share: float = 0.005
    turn: float = 0.7
    sparsity: float = 1.25e-7
    gates: bool = True

    category: ClassVar[Category] = "specification"
    review_category: ClassVar[ReviewCategory] = "partial"
    count: ClassVar[str] = "2 x all of the module, a share kept"
    default_at: ClassVar[str] = "block.linear | block.norm"
    learning_rate: ClassVar[float] = 1e-3

    def check(self) -> None:
        if not 0 < self.share <= 1 or not 0 < self.turn < 1 or self.sparsity < 0:
            raise ConfigurationError(
                "diff_pruning: share lies in (0, 1], turn in (0, 1) and sparsity is 0 or more; "
                f"found {self}."
            )

    def select(self, site: Site) -> Mapping[str, Form]:
        form = _Gated() if self.gates else Difference()
        return {name: form for name, value in site.parameters.items() if value is not None}

    def idle(self, site: Site, leaf: str) -> bool:
        return _is_gate(leaf)  # it begins wide open, where only noise and the penalty move it

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        noisy = dict(p)
        for name in filter(_is_gate, p):
            even = torch.rand(p[name].shape, generator=draws.of(site.name, name))
            noisy[name] = p[name] + torch.logit(even, eps=1e-6).to(p[name])
        return noisy

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        # A parameter that is tied has one gate, which several sites hold.
        gates = {id(leaf): leaf for p in sites for name, leaf in p.items() if _is_gate(name)}
        if not gates or not self.sparsity:
            return None
        open_gates = [torch.sigmoid(gate).sum() for gate in gates.values()]
        return self.sparsity * torch.stack(open_gates).sum()

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        return {"turned": torch.zeros(1, dtype=torch.bool)}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        turns = self.gates and moment.done >= self.turn and not memory["turned"]
        if turns:
            memory["turned"].fill_(True)
            self._cut([pair for held in sites for pair in _pairs(held.values)])
        for held in sites if memory["turned"] else ():
            for name, gradient in held.gradients.items():
                # The gradients of the turn are those of values that are no longer there.
                moves = not turns and not _is_gate(name)
                gradient.mul_(_open(held.values[f"{name}.gate"]) if moves else 0.0)
        return turns

    def _cut(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Sets each w to z w where that is among the largest, else to zero, and the gates to it."""
        worth = torch.cat([(_open(gate) * w).abs().flatten() for w, gate in pairs])
        masks = torch.split(best(worth, self.share), [w.numel() for w, _ in pairs])
        for (w, gate), mask in zip(pairs, masks, strict=True):
            w.mul_(_open(gate) * mask.view_as(w))
            gate.copy_(torch.where(mask.view_as(gate), _OPEN, -_OPEN))

    def stored(self) -> Method:
        return replace(self, gates=False)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        if not self.gates:
            return p
        return {n: _open(p[f"{n}.gate"]) * w for n, w in p.items() if not _is_gate(n)}


class _Gated(Difference):
    additive = False

    def leaves(self, site: Site, parameter: str) -> Mapping[str, Leaf]:
        (w,) = super().leaves(site, parameter).values()
        return {parameter: w, f"{parameter}.gate": constant(*w.shape, value=5.0)}

    def fold(self, incoming: Tensor, base: Tensor, p: Leaves, name: str) -> Tensor:
        return incoming + _open(p[f"{name}.gate"]) * p[name]


def _open(a: Tensor) -> Tensor:
    """z of the gates a."""
    return (3.0 * torch.sigmoid(a) - 1.5).clamp(0.0, 1.0)


def _is_gate(leaf: str) -> bool:
    return leaf.endswith(".gate")


def _pairs(p: Leaves) -> list[tuple[Tensor, Tensor]]:
    return [(w, p[f"{name}.gate"]) for name, w in p.items() if not _is_gate(name)]
