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
from deltatune.core.method import Category, Leaves, Method, ReviewCategory, register
from deltatune.core.policy import Draws, Held, Moment
from deltatune.core.select import Difference, Form
from deltatune.core.site import Site
from deltatune.primitives.hard_concrete import GATE, Gated, noisy, opened
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
                f"share lies in (0, 1], turn in (0, 1) and sparsity is 0 or more; found {self}."
            )

    def select(self, site: Site) -> Mapping[str, Form]:
        form = Gated() if self.gates else Difference()
        return {name: form for name, value in site.parameters.items() if value is not None}

    def idle(self, site: Site, leaf: str) -> bool:
        return _is_gate(leaf)  # it begins wide open, where only noise and the penalty move it

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        gates = {n: noisy(a, draws.of(site.name, n)) for n, a in p.items() if _is_gate(n)}
        return {**p, **gates}

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        # A parameter that is tied has one gate, which several sites hold.
        gates = {id(a): torch.sigmoid(a).sum() for p in sites for n, a in p.items() if _is_gate(n)}
        return self.sparsity * torch.stack([*gates.values()]).sum() if gates else None

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
                gradient.mul_(opened(held.values[name + GATE]) if moves else 0.0)
        return turns

    def _cut(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Sets each w to z w where that is among the largest, else to zero, and the gates to it."""
        worth = torch.cat([(opened(gate) * w).abs().flatten() for w, gate in pairs])
        masks = torch.split(best(worth, self.share), [w.numel() for w, _ in pairs])
        for (w, gate), mask in zip(pairs, masks, strict=True):
            w.mul_(opened(gate) * mask.view_as(w))
            gate.copy_(torch.where(mask.view_as(gate), _OPEN, -_OPEN))

    def stored(self) -> Method:
        return replace(self, gates=False)

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        if not self.gates:
            return p
        return {n: opened(p[n + GATE]) * w for n, w in p.items() if not _is_gate(n)}


def _is_gate(leaf: str) -> bool:
    return leaf.endswith(GATE)


def _pairs(p: Leaves) -> list[tuple[Tensor, Tensor]]:
    return [(w, p[name + GATE]) for name, w in p.items() if not _is_gate(name)]
