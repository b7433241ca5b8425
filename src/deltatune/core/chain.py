"""Chains: one ordered list of deltas for each module, installed as the instance's `forward`.

A chain is a plain object with state, never a hook or a closure: the base's class, names, state dict
and flags stay as they are, copies are independent, and a model that was compiled earlier sees the
change. The order at a site is: arounds (the root opens the banks; virtual tokens lengthen a stack),
then weights folded in the order of attachment, then outputs in that order.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.calls import in_order, of_rows, parameter_names, read_first
from deltatune.core.errors import UnsupportedError
from deltatune.core.link import Link
from deltatune.core.low_rank import followed, linear_with
from deltatune.core.mixing import mixed
from deltatune.core.quantised import Quantised
from deltatune.core.rows import by_slot, spread
from deltatune.core.storage import storage_of, wide

__all__ = ["Around", "Chain", "Inner"]

Inner = Callable[..., Any]
Around = Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]


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
        links = [link for link in self.links if link.live and link.mixer is None]
        if not links:
            return self.base(*args, **kwargs)
        for link in links:
            if link.method.at_input:
                args = (self.act(link, args, args[0]), *args[1:])
        folding = [link for link in links if link.method.face in ("weight", "select")]
        output = self.weights(folding, args, kwargs) if folding else self.base(*args, **kwargs)
        acting = [k for k in links if k.method.face in ("output", "mix") and not k.method.at_input]
        if not acting:
            return output
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, Tensor):
            raise UnsupportedError(
                f"{acting[0].site.name} returns {type(y).__name__}; an output face needs a tensor, "
                "alone or first in a tuple. Choose a target inside the module."
            )
        for link in acting:
            mixes = link.method.face == "mix"
            y = mixed(self, link, args, kwargs, y) if mixes else self.act(link, args, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def act(self, link: Link, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """The output after one output face, [rows, ..., features]."""
        x = link.entry_input if link.site.entry is not None else args[0] if args else y
        link.entry_input = None
        assert x is not None
        link.check_rows(y.shape[0])
        rows, part = link.rows(y.shape[0]), link.cut(y)
        leaves = link.stacked(y.dtype)
        if link.reader is None:
            new = spread(link.method.output, rows, x, part, leaves, slotwise=False)
        elif rows.empty:
            return y
        else:
            text = link.reader.of(link, y)
            if link.method.shows():
                shown = by_slot(link.method.show, rows, x, part, text, leaves, None)
                text = link.reader.with_shown(link, text, shown)
            if link.method.carries():
                carried = by_slot(link.method.carry, rows, x, part, text, leaves, None)
                text = link.reader.with_carried(link, text, carried)
            new = by_slot(link.method.read, rows, x, part, text, leaves, part)
        return link.paste(y, link.weaken(part, new.to(y.dtype)))

    def weights(self, links: list[Link], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with its parameters folded; what has a cheaper road takes it."""
        args = self._per_row(links, args)
        size = args[0].shape[0]
        uniform = all(link.rows(size).uniform is not None for link in links)
        roads = self._roads(links, uniform)
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
        # Those behind another method's road add to what that has made of the output.
        first = list(itertools.takewhile(lambda link: link.method.has_factors(), fast))
        output = None if folded or kwargs else self.at_once(first, args)
        if output is None:
            output = self.folded(folded, args, kwargs)
        else:
            fast = fast[len(first) :]
        for link in fast:
            output = self.add(link, args, output)
        return output

    def add(self, link: Link, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """The output after one link that has a cheaper road than folding."""
        rows, part = link.rows(args[0].shape[0]), link.cut(y)
        leaves = link.stacked(y.dtype)
        with link.read(args[0], rows) as x:
            new = spread(link.fast, rows, x, part, leaves, slotwise=True)
        return link.paste(y, new.to(y.dtype))

    def at_once(self, links: list[Link], args: tuple[Any, ...]) -> Tensor | None:
        """The output with all low-rank differences, computed together with the frozen map; None
        where this cannot be done: the map is not a plain one, or rows are mixed.
        """
        x = args[0]
        low_rank = [(one, one.rows(x.shape[0])) for one in links if one.method.has_factors()]
        low_rank = [(link, rows) for link, rows in low_rank if not rows.empty]
        if not low_rank:
            return None
        dense = storage_of(self.module).dense(self.module)
        if (
            dense is None
            or self.previous is not None
            or len(args) > 1
            or any(one.dtype != x.dtype for one in dense if isinstance(one, Tensor))
            or any(one.requires_grad for one in dense if isinstance(one, Tensor))  # by hand
            or torch.is_autocast_enabled(x.device.type)
            or followed()
            or any(
                rows.uniform is None and rows.equal is None and rows.apart(x) is None
                for _, rows in low_rank
            )
        ):
            return None
        return linear_with(x, *dense, [link.difference(used, x.dtype) for link, used in low_rank])

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
            raise links[0].called_once()
        ids = args[0].expand(routed, *args[0].shape[1:]) if args[0].shape[0] == 1 else args[0]
        return (ids, *args[1:])

    def _roads(self, links: list[Link], uniform: bool) -> list[str]:
        """How each link takes part, see `_road`. A bias is not folded where the output is turned
        or scaled by a link before it.
        """
        roads: list[str] = []
        for link in links:
            roads.append(self._road(link, uniform))
            uniform = uniform and (roads[-1] != "fast" or link.method.has_factors())
        return roads

    def _road(self, link: Link, uniform: bool) -> str:
        """How a link takes part: "fold", "fast" (added to the output) or "bias" (folded, weight
        untouched).
        """
        if link.method.face == "weight":
            return "fast" if link.method.has_fast() else "fold"
        if link.adds_bias:
            quantised = isinstance(storage_of(self.module), Quantised)
            return "bias" if uniform and not quantised else "fast"
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
        own: dict[str, Tensor] = {
            name: value for name, value in self.module._parameters.items() if value is not None
        }
        storage = storage_of(self.module)
        if isinstance(storage, Quantised):
            own["weight"] = storage.dequantise(self.module, torch.float32)
        touched = {name for link in links for name in link.touched}
        present = {name: wide(value) for name, value in own.items() if name in touched}
        base = dict(present)
        for name in present:
            before = links[0].site.before(name)
            if before is not None:
                base[name] = wide(before)
        values: dict[str, Tensor | None] = dict(present)
        first = next(iter(own.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        with torch.autocast(first.device.type, enabled=False):
            for link, slot in zip(links, slots, strict=True):
                if slot is not None:
                    values = link.fold(values, base, link.leaves(slot, dtype))
        return own | {
            name: value.to(first.dtype)
            for name, value in values.items()
            if value is not None and value is not present.get(name)
        }

    def compute(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's output with other parameters."""
        storage = storage_of(self.module)
        created = {name: v for name, v in values.items() if name not in self.module._parameters}
        if (
            set(values) <= {"weight", "bias"}
            and len(args) == 1
            and not kwargs
            and self.previous is None
        ):
            bias = None if "bias" in created else values.get("bias")
            y = storage.compute(self.module, args[0], values["weight"], bias)
            if y is not None:
                return y + created["bias"].to(y.dtype) if created else y
        if isinstance(storage, Quantised):
            raise UnsupportedError(
                f"A {type(self.module).__name__} kept as {storage.format(self.module)} cannot be "
                "computed with another weight where its forward was replaced (by offloading, say). "
                "Choose a method that leaves the weight as it is, such as lora or an adapter."
            )
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
