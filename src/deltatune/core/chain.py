"""Chains: one ordered list of deltas for each module, installed as the instance's `forward`.

A chain is a plain object with state, never a hook or a closure: the base's class, names, state dict
and flags stay as they are, copies are independent, and a model that was compiled earlier sees the
change. The order at a site is: arounds (the root opens the banks; virtual tokens lengthen a stack),
then weights folded in the order of attachment, then outputs in that order.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.calls import in_order, of_rows, parameter_names, read_first
from deltatune.core.errors import UnsupportedError
from deltatune.core.leaf import generator
from deltatune.core.method import Leaves, Method
from deltatune.core.rows import Rows, fit, spread
from deltatune.core.select import Form
from deltatune.core.site import Site
from deltatune.core.storage import storage_of, wide

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

__all__ = ["Around", "Chain", "Link"]

Inner = Callable[..., Any]
Around = Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(eq=False)
class Link:
    """One method of one delta at one site.

    Attributes:
        names: the method's leaf names to the bank's.
        forms: of a `select` method, the parameters it tunes at this site.
        entry_input: what the entry module of a span was first called with; None outside of a
            forward.
    """

    delta: Delta
    method: Method
    site: Site
    names: Mapping[str, str]
    forms: Mapping[str, Form]
    entry_input: Tensor | None = None

    @property
    def live(self) -> bool:
        """Whether it acts just now; what is merged acts through the weights."""
        return self.delta.enabled and not self.delta.merged

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
            return y + p["bias"].unsqueeze(-2)
        return self.method.fast(x, y, p)

    def stacked(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The leaves of this site with their slot axis, in `dtype`."""
        bank = self.delta.bank
        assert isinstance(bank, Bank)
        held = bank.stacked(dtype, self.delta.rows.groups)
        return {name: held[key] for name, key in self.names.items()}

    def leaves(self, slot: int) -> dict[str, Tensor]:
        """The leaves of this site for one slot, in fp32."""
        return {name: leaf[slot] for name, leaf in self.stacked(torch.float32).items()}

    def rows(self, size: int) -> Rows:
        """The slot of each of `size` rows.

        What is computed once for all rows has a size of its own, which one slot for all fits.
        """
        return fit(self.delta.rows.narrowed, size)

    def cut(self, y: Tensor) -> Tensor:
        """The features of the module's output that the site is."""
        return y if self.site.rows is None else y[..., slice(*self.site.rows)]

    def paste(self, y: Tensor, part: Tensor) -> Tensor:
        """The module's output with the site's features replaced. Undoes `cut`."""
        if self.site.rows is None:
            return part
        start, stop = self.site.rows
        return torch.cat([y[..., :start], part, y[..., stop:]], dim=-1)

    def drop(self, x: Tensor, rows: Rows) -> Tensor:
        """Dropout on what the face reads, drawn from (seed of the slot, step, site)."""
        rate = self.method.dropout
        if not rate or not self.delta.dropping:
            return x
        mask = torch.ones_like(x)
        for slot, members in rows.groups.items():
            if slot is None:
                continue
            random = generator("dropout", self.delta.seeds[slot], self.delta.step, self.site.name)
            kept = torch.rand((len(members), *x.shape[1:]), generator=random) >= rate
            mask[torch.tensor(members)] = (kept / (1 - rate)).to(x)
        return x * mask

    def fold(
        self, values: dict[str, Tensor | None], base: Mapping[str, Tensor], p: Leaves
    ) -> dict[str, Tensor | None]:
        """New values of the module's parameters, fp32, from those after the links before it."""
        if self.method.face == "select":
            folded = dict(values)
            for name, form in self.forms.items():
                before = values.get(name)
                before = torch.zeros_like(p[name]) if before is None else before
                folded[name] = form.fold(before, base.get(name, before), p, name)
            return folded
        view = storage_of(self.site.module).view
        weight, bias = values["weight"], values.get("bias")
        assert weight is not None
        whole, rows = view(weight), slice(*(self.site.rows or (None, None)))
        W, b = self.method.weight(whole[rows], None if bias is None else bias[rows], p)
        if self.site.rows is not None:
            W = torch.cat([whole[: rows.start], W, whole[rows.stop :]])
            if b is not None and bias is not None:
                b = torch.cat([bias[: rows.start], b, bias[rows.stop :]])
        return {**values, "weight": view(W), "bias": b}


class Chain:
    """Everything that deltas do at one module.

    Args:
        module: the module; its instance `forward`, if it has one (offloading wrappers), is kept
            inside.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.links: list[Link] = []
        self.entries: list[Link] = []
        self.arounds: list[Around] = []
        self.called = False
        self.names = parameter_names(module)  # looked up here: a compiler cannot follow
        slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.previous = module.__dict__.get(slot)
        module.__dict__[slot] = self

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward in its place: `generate` and trainers look arguments up in
        it.
        """
        return inspect.signature(
            self.previous or types.MethodType(type(self.module).forward, self.module)
        )

    @property
    def unused(self) -> bool:
        """Whether nothing is left to do at the module."""
        return not (self.links or self.entries or self.arounds)

    def remove(self) -> None:
        """Puts back the forward that was there, also below a wrapper that came later."""
        for slot in ("_old_forward", "forward"):
            if self.module.__dict__.get(slot) is self:
                if self.previous is None and slot == "_old_forward":  # a wrapper calls this
                    own = types.MethodType(type(self.module).forward, self.module)
                    self.module.__dict__[slot] = own
                elif self.previous is None:
                    del self.module.__dict__[slot]
                else:
                    self.module.__dict__[slot] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, within what was put around it; the first around is the outermost."""
        self.called = True
        call: Inner = self.run
        for around in reversed(self.arounds):
            call = _Nested(around, call)
        return call(*args, **kwargs)

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before the chain."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call with all links that are live: folds first, then outputs.

        Raises UnsupportedError where an output face meets something that is no tensor.
        """
        args, kwargs = read_first(self.names, args, kwargs)
        for link in self.entries:
            # The first call since the span ended: DeBERTa calls its projections again, on a table.
            if link.live and link.entry_input is None:
                link.entry_input = args[0]
        for link in self.links:
            link.delta.check_recomputation()
        links = [link for link in self.links if link.live]
        if not links:
            return self.base(*args, **kwargs)
        folding = [link for link in links if link.method.face in ("weight", "select")]
        output = self.weights(folding, args, kwargs) if folding else self.base(*args, **kwargs)
        acting = [link for link in links if link.method.face == "output"]
        if not acting:
            return output
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, Tensor):
            raise UnsupportedError(
                f"{acting[0].site.name} returns {type(y).__name__}; an output face needs a tensor, "
                "alone or first in a tuple. Choose a target inside the module."
            )
        for link in acting:
            y = self.act(link, args, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def act(self, link: Link, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """The output after one output face, [rows, ..., features]."""
        x = link.entry_input if link.site.entry is not None else args[0] if args else y
        link.entry_input = None
        assert x is not None
        rows, part = link.rows(y.shape[0]), link.cut(y)
        new = spread(link.method.output, rows, x, part, link.stacked(y.dtype), slotwise=False)
        return link.paste(y, new.to(y.dtype))

    def weights(self, links: list[Link], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with its parameters folded; what has a cheaper road takes it."""
        args = self._per_row(links, args)
        size = args[0].shape[0]
        uniform = all(link.rows(size).uniform is not None for link in links)
        roads = [self._road(link, uniform) for link in links]
        # Only what comes after the last fold of the weight may be added to the output: folds see
        # the weight as the deltas before them left it.
        last = -1
        for k, road in enumerate(roads):
            last = k if road == "fold" else last
        folded = [link for k, link in enumerate(links) if k <= last or roads[k] == "bias"]
        fast = [link for k, link in enumerate(links) if k > last and roads[k] == "fast"]
        for link in folded:
            if link.method.dropout and link.delta.dropping:
                raise UnsupportedError(
                    f"{link.method.name} at {link.site.name} drops its input, which "
                    f"{links[last].method.name}, attached after it, would fold away. "
                    "Set dropout to 0 or attach it last."
                )
        output = self.folded(folded, args, kwargs)
        for link in fast:
            rows, part = link.rows(size), link.cut(output)
            x, leaves = link.drop(args[0], rows), link.stacked(output.dtype)
            new = spread(link.fast, rows, x, part, leaves, slotwise=True)
            output = link.paste(output, new.to(output.dtype))
        return output

    def _per_row(self, links: list[Link], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with one entry for each row, where rows go through different slots.

        Positions are embedded once for all rows. Tables inside a block (T5's relative positions)
        are read once for each pair of positions, so that no row of theirs is a row of the batch.
        """
        site, routed = links[0].site, max(len(link.delta.rows.slots) for link in links)
        table = isinstance(self.module, nn.Embedding)
        shared = site.part == "relative" or (table and site.part != "embedding")
        one = all(len(set(link.delta.rows.slots)) == 1 for link in links)
        if one or not (table or shared or args[0].shape[0] % routed):
            return args
        if not table or shared:
            raise UnsupportedError(
                f"{site.path} is also called once for all rows, so the rows of a batch cannot "
                "use different slots of it. Route the whole batch to one slot."
            )
        ids = args[0].expand(routed, *args[0].shape[1:]) if args[0].shape[0] == 1 else args[0]
        return (ids, *args[1:])

    def _road(self, link: Link, uniform: bool) -> str:
        """How a link takes part: "fold", "fast" (added to the output) or "bias" (folded, weight
        untouched).
        """
        if link.method.face == "weight":
            return "fast" if link.method.has_fast() else "fold"
        if link.adds_bias:
            return "bias" if uniform else "fast"
        return "fold"

    def folded(self, links: list[Link], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output with the links folded in, group by group where rows use different slots."""
        if not links:
            return self.base(*args, **kwargs)
        x = args[0]
        keys = list(zip(*(link.rows(x.shape[0]).slots for link in links), strict=True))
        groups = {
            key: [row for row, k in enumerate(keys) if k == key] for key in dict.fromkeys(keys)
        }
        if len(groups) == 1:
            return self.compute(self.parameters(links, keys[0]), args, kwargs)
        outputs = [
            self.compute(self.parameters(links, key), *of_rows(rows, args, kwargs))
            for key, rows in groups.items()
        ]
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return in_order(outputs, order)

    def parameters(self, links: list[Link], slots: tuple[int | None, ...]) -> dict[str, Tensor]:
        """The module's folded parameters, computed in fp32 and cast once to the module's dtype."""
        own = {name: value for name, value in self.module._parameters.items() if value is not None}
        touched = {name for link in links for name in link.touched}
        present = {name: wide(value) for name, value in own.items() if name in touched}
        base = dict(present)
        for name in present:
            frozen = links[0].site.frozen(name)
            if frozen is not None and frozen is not own[name]:
                base[name] = wide(frozen)
        values: dict[str, Tensor | None] = dict(present)
        first = next(iter(own.values()))
        with torch.autocast(first.device.type, enabled=False):
            for link, slot in zip(links, slots, strict=True):
                if slot is not None:
                    values = link.fold(values, base, link.leaves(slot))
        return own | {
            name: value.to(first.dtype)
            for name, value in values.items()
            if value is not None and value is not present.get(name)
        }

    def compute(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's output with other parameters."""
        created = {name: v for name, v in values.items() if name not in self.module._parameters}
        if (
            set(values) <= {"weight", "bias"}
            and len(args) == 1
            and not kwargs
            and self.previous is None
        ):
            bias = None if "bias" in created else values.get("bias")
            y = storage_of(self.module).compute(self.module, args[0], values["weight"], bias)
            if y is not None:
                return y + created["bias"].to(y.dtype) if created else y
        shadow = self.module.__dict__
        kept = {name: value for name, value in values.items() if name not in created}
        try:
            shadow.update(kept)
            y = self.base(*args, **kwargs)
        finally:
            for name in kept:
                shadow.pop(name, None)
        return y + created["bias"].to(y.dtype) if created else y


@dataclass
class _Nested:
    around: Around
    inner: Inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.inner, args, kwargs)
