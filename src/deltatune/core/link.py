"""Links: what one method of one delta does at one site, and to which rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.core.bank import Bank
from deltatune.core.dropout import Mask, drop
from deltatune.core.errors import UnsupportedError
from deltatune.core.low_rank import Difference
from deltatune.core.method import Leaves, Method
from deltatune.core.mixer import Mixer
from deltatune.core.policy import Draws, sampled
from deltatune.core.rows import Rows, fit
from deltatune.core.select import Form
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.core.text import TextReader

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

__all__ = ["Link"]


@dataclass(eq=False)
class Link:
    """One method of one delta at one site.

    Attributes:
        part: the prefix of its leaves; see `layout`.
        stage: in which it is trained; None for every one.
        names: the method's leaf names to the bank's.
        forms: of a `select` method, the parameters it tunes at this site.
        entry_input: what the entry module of a span was first called with; None outside of a
            forward.
        reader: of the text of its token stack, for a method that needs it.
        members: of a mixer, the links that it weighs.
        mixer: by which it is weighed, and acts.
    """

    delta: Delta
    part: str
    stage: int | None
    method: Method
    site: Site
    names: Mapping[str, str]
    forms: Mapping[str, Form]
    entry_input: Tensor | None = None
    reader: TextReader | None = None
    members: list[Link] = field(default_factory=list, repr=False)
    mixer: Link | None = field(default=None, repr=False)

    @property
    def live(self) -> bool:
        """Whether it acts just now; what is merged acts through the weights."""
        return self.delta.enabled and not self.delta.merged and not self._awaits(self.delta.stage)

    def _awaits(self, stage: int | None) -> bool:
        return stage is not None and self.stage is not None and stage < self.stage

    @property
    def weighs_tokens(self) -> bool:
        """Whether it is a mixer of keys and values, which an attention asks for its weights."""
        return any(member.method.face == "attend" for member in self.members)

    @property
    def foresees(self) -> bool:
        """Whether it is a mixer that reads a first pass without the delta."""
        return isinstance(self.method, Mixer) and self.method.foresees

    @property
    def adds_bias(self) -> bool:
        """Whether all it does is to add to the module's bias, which is adding to its output."""
        form = self.forms.get("bias")
        if form is None or len(self.forms) > 1 or not form.additive:
            return False
        return "bias" not in self.site.parameters or storage_of(self.site.module).adds_bias

    @property
    def touched(self) -> set[str]:
        """The parameters of the module that it folds into."""
        return set(self.forms) if self.method.face == "select" else {"weight", "bias"}

    def fast(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        """The cheaper road to the folded output, with or without a slot axis."""
        if self.method.face == "select":
            return y + self.method.strength * p["bias"].unsqueeze(-2)
        return self.weaken(y, self.method.fast(x, y, p))

    def weaken(self, before: Tensor, after: Tensor) -> Tensor:
        """What becomes of a value when the method acts by its strength."""
        strength = self.method.strength
        return after if strength == 1 else before + strength * (after - before)

    def stacked(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The leaves of this site in `dtype`, of the slots that rows use, in their order."""
        bank, rows = self.delta.bank, self.delta.rows
        assert isinstance(bank, Bank)
        if rows.empty:
            return {}
        held = bank.stacked(dtype, rows.order, {} if self.delta.routed is None else rows.kept)
        leaves = {name: held[key] for name, key in self.names.items()}
        if not self.delta.trains(self.stage):
            leaves = {name: leaf.detach() for name, leaf in leaves.items()}
        if not (self.method.has_sample() and self.delta.dropping):
            return leaves
        draws = [Draws(self.delta.seeds[slot], self.delta.step_of(slot)) for slot in rows.order]
        return sampled(self.method, self.site, leaves, draws)

    def leaves(self, slot: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The leaves of this site for one slot; without a graph where no row uses it.

        Args:
            slot: which.
            dtype: of the fold: fp32, or fp64 where the base is.
        """
        order = self.delta.rows.order
        if slot not in order:
            held = self.delta.bank.read(slot)
            values = {name: held[key].detach() for name, key in self.names.items()}
            return {n: v.to(dtype) if v.is_floating_point() else v for n, v in values.items()}
        place = order.index(slot)
        return {name: leaf[place] for name, leaf in self.stacked(dtype).items()}

    def difference(self, rows: Rows, dtype: torch.dtype) -> Difference:
        """What a method with factors adds, for rows of one slot or whole groups of slots."""
        leaves = self.stacked(dtype)
        if rows.uniform is not None:
            leaves = {name: leaf[0] for name, leaf in leaves.items()}
        A, B = self.method.factors(leaves)
        start, stop = self.site.rows or (0, B.shape[-2])
        runs = None if rows.uniform is not None or rows.equal is not None else rows.runs
        B = B if self.method.strength == 1 else self.method.strength * B
        return Difference(A, B, start, stop, self.mask(rows), runs)

    def rows(self, size: int) -> Rows:
        """The slot of each of `size` rows.

        What is computed once for all rows has a size of its own, which one slot for all fits.
        """
        return fit(self.delta.rows.narrowed, size)

    def check_rows(self, size: int) -> None:
        """Raises UnsupportedError where one row stands for a batch that uses several slots."""
        if size == 1 and len(set(self.delta.rows.slots)) > 1:
            raise self.called_once()

    def called_once(self) -> UnsupportedError:
        """What is raised there."""
        return UnsupportedError(
            f"{self.site.path} is also called once for all rows, so the rows of a batch cannot use "
            "different slots of it. Route the whole batch to one slot."
        )

    def cut(self, y: Tensor) -> Tensor:
        """The features of the module's output that the site is."""
        return y if self.site.rows is None else y[..., slice(*self.site.rows)]

    def paste(self, y: Tensor, part: Tensor) -> Tensor:
        """The module's output with the site's features replaced. Undoes `cut`."""
        if self.site.rows is None:
            return part
        start, stop = self.site.rows
        return torch.cat([y[..., :start], part, y[..., stop:]], dim=-1)

    def read(self, x: Tensor, rows: Rows) -> AbstractContextManager[Tensor]:
        """What `fast` reads: the input after dropout."""
        mask = self.mask(rows)
        return contextlib.nullcontext(x) if mask is None else drop(x, mask)

    def mask(self, rows: Rows) -> Mask | None:
        """Dropout of the input, drawn from (seed of the slot, step, site); None without it."""
        delta = self.delta
        if not self.method.dropout or not delta.dropping or rows.empty:
            return None
        keys = [
            ((delta.seeds[slot], delta.step_of(slot), self.site.name), members)
            for slot, members in rows.groups.items()
            if slot is not None
        ]
        return Mask(self.method.dropout, keys)

    def fold(
        self, values: dict[str, Tensor | None], base: Mapping[str, Tensor], p: Leaves
    ) -> dict[str, Tensor | None]:
        """New values of the module's parameters, fp32, from those after the links before it."""
        if self.method.face == "select":
            folded = dict(values)
            for name, form in self.forms.items():
                before = values.get(name)
                before = torch.zeros_like(p[name]) if before is None else before
                after = form.fold(before, base.get(name, before), p, name)
                folded[name] = self.weaken(before, after)
            return folded
        view = storage_of(self.site.module).view
        weight, bias = values["weight"], values.get("bias")
        assert weight is not None
        whole, rows = view(weight), slice(*(self.site.rows or (None, None)))
        own = None if bias is None else bias[rows]
        W, b = self.method.weight(whole[rows], own, p)
        W = self.weaken(whole[rows], W)
        b = b if b is None or b is own else self.weaken(_zero(own, b), b)
        if self.site.rows is not None:
            W = torch.cat([whole[: rows.start], W, whole[rows.stop :]])
            if b is not None and bias is not None:
                b = torch.cat([bias[: rows.start], b, bias[rows.stop :]])
        return {**values, "weight": view(W), "bias": b}


def _zero(bias: Tensor | None, like: Tensor) -> Tensor:
    """A bias, zero where there is none."""
    return torch.zeros_like(like) if bias is None else bias
