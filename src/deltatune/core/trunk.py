"""The trunk: what of a model lies below everything that deltas do.

The boundary is the module that is called first of those that a delta acts in: a block of a stack,
or a module after all blocks, as a head; in an encoder-decoder whose encoder no delta acts in, the
decoder, which reads what the encoder gives. What the boundary reads is a fixed function of a row.
`reach` computes it and goes no further; `above` computes a model's output from it. All code of the
model outside of the blocks below runs in both, so that masks, positions and tables are its own: in
`above` a block below hands on what it got, and the boundary reads what was given.

Some blocks hand on more than hidden states. T5's first makes the positions' bias, which all others
read: then the first runs, and its bias is handed on. Whatever else a family does is found out by
comparing the output of `above` with that of the model, which is up to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.calls import parameter_names
from deltatune.core.chain import Around, Inner
from deltatune.core.errors import StateError, UnsupportedError
from deltatune.core.fingerprint import fingerprint
from deltatune.core.host import Host, host_of
from deltatune.core.in_place import InPlaceBank
from deltatune.core.link import Link
from deltatune.core.roles import block_path, places

__all__ = ["Trunk"]

_ENCODED = "encoder_hidden_states"  # what decoders of transformers call the encoder's output


class Trunk:
    """The trunk of a model with deltas.

    Args:
        model: with at least one delta that acts.

    Attributes:
        boundary: path of the module that reads what the trunk gives.
        argument: the name of what it reads.
        below: paths of the blocks below the boundary; empty if there is no trunk.
        share: what the trunk takes of a training step, 0 to 1, estimated from parameters: below the
            boundary there is one pass, above it two.

    Raises:
        StateError: no delta acts.
        UnsupportedError: the backbone is trained itself, checkpointed or compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        host = host_of(model)
        if host is not None:
            _check(host)
        if host is None or not _acting(host):
            raise StateError("There is no trunk where no delta acts. Attach one first.")
        self.host = host
        names = {module: name for name, module in model.named_modules()}
        self._order = order = {module: number for number, module in enumerate(names)}
        blocks = _blocks(model)
        first = min(_modules(host), key=order.__getitem__)
        inside = [path for path in blocks if f"{names[first]}.".startswith(f"{path}.")]
        bound = model.get_submodule(inside[0]) if inside else first
        decoder = _decoder(model, blocks, bound, order)
        bound = bound if decoder is None else decoder
        self._module, self.boundary = bound, names[bound]
        self.argument = parameter_names(bound)[0] if decoder is None else _ENCODED
        self.below = [p for p in blocks if order[model.get_submodule(p)] < order[bound]]
        self._above = [path for path in blocks if path not in self.below]
        self._blocks = _stand_ins(self)
        self._mode: Literal["reach", "above"] | None = None
        self._given: list[Tensor] = []  # what the boundary reads next
        self._condition = self._now()

    @property
    def share(self) -> float:
        """See the class."""
        below, above = self._parameters(self.below), self._parameters(self._above)
        return below / max(below + 2 * above, 1)

    def _parameters(self, paths: Sequence[str]) -> int:
        modules = [self.host.model.get_submodule(path) for path in paths]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def identity(self) -> dict[str, str]:
        """What the states of a row depend on beside the row: the weights that they are made with,
        and where they are read.

        Raises UnsupportedError if the weights are not in memory.
        """
        model = self.host.model
        heads = [place.module for place in places(model) if place.part == "head"]
        later = list(self._order)[self._order[self._module] :]
        heads = [path for path in heads if model.get_submodule(path) in later]
        excluded = {self.boundary, *self._above, *heads}
        weights = fingerprint(model, excluded=excluded).weights
        if weights is None:
            raise UnsupportedError(
                f"The weights below {self.boundary} are not in memory, so what they give cannot be "
                "recognised. Load the backbone whole."
            )
        return {"weights": weights, "boundary": self.boundary, "argument": self.argument}

    @contextmanager
    def installed(self, around: Around) -> Iterator[None]:
        """Within it `around` is called in the place of the model, and may use the trunk."""
        placed: list[tuple[nn.Module, Around]] = [
            (self._module, self._at_boundary),
            *((block.module, block) for block in self._blocks),
            (self.host.model, around),
        ]
        for module, one in placed:
            self.host.chain(module).arounds.append(one)
        try:
            yield
        finally:
            for module, one in placed:
                self.host.chain(module).arounds.remove(one)
            self.host.sweep()

    @torch.no_grad()
    def reach(self, inner: Inner, batch: Mapping[str, Tensor]) -> Tensor:
        """What the boundary reads, [rows, ...], computed as far as there.

        Raises UnsupportedError if the boundary is not reached, or a delta acts before it;
        StateError as `above`.
        """
        self._check_condition()
        others = [chain for chain in self.host.chains if chain.module is not self._module]
        chains = [chain for chain in others if _live(chain.links, chain.entries)]
        called = [chain for chain in chains if chain.called]
        for chain in chains:
            chain.called = False
        try:
            states = self._reached(inner, batch)
            early = [chain for chain in chains if chain.called]
        finally:
            for chain in called:
                chain.called = True
        if early:
            raise UnsupportedError(
                f"A delta acts in {type(early[0].module).__name__} before {self.boundary} is "
                "called, so that what is below is no fixed function. Train without a cache."
            )
        for block in self._blocks:
            block.learn()
        return states

    def _reached(self, inner: Inner, batch: Mapping[str, Tensor]) -> Tensor:
        self._mode = "reach"
        try:
            inner(**batch)
        except _Reached as reached:
            return reached.states
        finally:
            self._mode = None
        raise self._never()

    def above(self, inner: Inner, batch: Mapping[str, Tensor], states: Tensor) -> Any:
        """The model's output for a batch whose boundary reads `states`, [rows, ...].

        Raises UnsupportedError if the boundary is not called exactly once, StateError if other
        deltas act than when the trunk was found.
        """
        self._check_condition()
        self._mode, self._given = "above", [states]
        try:
            output = inner(**batch)
            if self._given:
                raise self._never()
        finally:
            self._mode, self._given = None, []
        return output

    def _at_boundary(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mode is None:
            return inner(*args, **kwargs)
        named = self.argument in kwargs
        place = 0 if named else parameter_names(self._module).index(self.argument)
        if self._mode == "reach":
            raise _Reached(kwargs[self.argument] if named else args[place])
        if not self._given:
            raise UnsupportedError(
                f"{self.boundary} is called several times in one pass. Train without a cache."
            )
        states = self._given.pop()
        if named:
            return inner(*args, **(kwargs | {self.argument: states}))
        return inner(*args[:place], states, *args[place + 1 :], **kwargs)

    def _never(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.boundary} takes no part in the forward pass. Choose a target whose modules do."
        )

    def _check_condition(self) -> None:
        if self._now() != self._condition:
            raise StateError(
                "A delta was attached, detached, merged or switched since the trunk was found. "
                "Do that between runs."
            )

    def _now(self) -> list[tuple[int, bool]]:
        return [(id(delta), delta.enabled and not delta.merged) for delta in self.host.deltas]


class _Reached(Exception):
    """Ends a pass at the boundary."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


@dataclass(eq=False)
class _StandIn:
    """Around a block below the boundary.

    Attributes:
        first: the first block of the boundary's own stack; None in another stack.
        seen: whether the pass under way has called it.
        rest: what it gives beside hidden states; None where it gives these alone.
        runs: whether it runs all the same, because later blocks read what it gives.
    """

    trunk: Trunk
    module: nn.Module
    path: str
    names: tuple[str, ...]
    first: _StandIn | None
    seen: bool = False
    rest: tuple[Any, ...] | None = None
    runs: bool = False

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = self.trunk._mode
        if mode == "above" and not self.runs:
            hidden = args[0] if args else kwargs[self.names[0]]
            rest = self.first.rest if self.first is not None and self.first.runs else self.rest
            return hidden if rest is None else (hidden, *rest)
        output = inner(*args, **kwargs)
        self.seen = self.seen or mode == "reach"
        if mode is not None:
            self.rest = output[1:] if isinstance(output, tuple) else None
        return output

    def learn(self) -> None:
        """Finds out, after a pass through all blocks below, what it must hand on."""
        if not self.seen:
            raise UnsupportedError(
                f"{self.path} is called after {self.trunk.boundary} or not at all, so it is not "
                "below. Train without a cache."
            )
        self.seen = False
        made = [one for one in self.rest or () if isinstance(one, Tensor)]
        if made and self.first is not None:
            others = self.first.rest or ()
            if not all(any(one is other for other in others) for one in made):
                raise UnsupportedError(
                    f"{self.path} gives more than hidden states to the blocks after it. "
                    "Train without a cache."
                )
            self.first.runs = True
        elif made:
            self.rest = (None,) * len(self.rest or ())


def _stand_ins(trunk: Trunk) -> list[_StandIn]:
    model, stack = trunk.host.model, trunk.boundary.rpartition(".")[0]
    firsts: dict[str, _StandIn] = {}
    found: list[_StandIn] = []
    for path in trunk.below:
        module = model.get_submodule(path)
        made = _StandIn(trunk, module, path, parameter_names(module), None)
        if path.rpartition(".")[0] == stack:
            made.first = firsts.setdefault(stack, made)
        found.append(made)
    return found


def _check(host: Host) -> None:
    """Raises UnsupportedError where what lies below a delta is no fixed function of a row."""
    model = host.model
    control = any(isinstance(delta.bank, InPlaceBank) for delta in host.deltas)
    if control or any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedError(
            "The backbone itself is trained, so none of it is a fixed function of the rows. Train "
            "without a cache."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedError(
            "Gradient checkpointing computes blocks again that a cache stands in for. Switch it "
            "off: below the boundary no activations are kept anyway."
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedError(
            "A compiled model is one graph, in which no part can be stood in for. Train without "
            "a cache, or compile nothing."
        )


def _live(*links: list[Link]) -> bool:
    return any(link.live for some in links for link in some)


def _acting(host: Host) -> list[Link]:
    return [link for delta in host.deltas for link in delta.links if link.live]


def _modules(host: Host) -> Iterator[nn.Module]:
    """The modules that deltas act in or read at."""
    for link in _acting(host):
        yield link.site.module
        if link.site.entry is not None:
            yield link.site.entry[1]


def _blocks(model: nn.Module) -> list[str]:
    """The paths of all blocks, in the order of the model."""
    found = [block_path(place) for place in places(model) if place.block is not None]
    return list(dict.fromkeys(found))


def _decoder(
    model: nn.Module, blocks: Sequence[str], bound: nn.Module, order: Mapping[nn.Module, int]
) -> nn.Module | None:
    """The decoder of an encoder-decoder, if the boundary lies after its encoder; else None."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    whole: Any = model
    encoded = set(whole.get_encoder().modules())
    found = [module for module in map(model.get_submodule, blocks) if module in encoded]
    decoder: nn.Module = whole.get_decoder()
    last = max((order[module] for module in found), default=-1)
    return decoder if order[bound] > last else None
