"""The host: what a model knows of the deltas attached to it.

It lies in the instance's `__dict__`, so that copies and pickles of the model carry their own, and
it is gone when the last delta is detached, with every flag as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.core.chain import Chain, Inner

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

__all__ = ["Host", "host_of"]

_KEY = "_deltatune"


class Host:
    """The deltas, chains and former flags of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.deltas: list[Delta] = []
        self.chains: list[Chain] = []
        self.merged: list[Delta] = []
        self.depth = 0
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.__dict__[_KEY] = self
        self.chain(model).arounds.append(_Opening(self))

    def chain(self, module: nn.Module) -> Chain:
        """The chain of a module, installed if there is none yet."""
        for chain in self.chains:
            if chain.module is module:
                return chain
        self.chains.append(Chain(module))
        return self.chains[-1]

    def sweep(self) -> None:
        """Removes what no delta uses any more; after the last one, itself."""
        if not self.deltas:
            for parameter_name, flag in self.flags.items():
                self.model.get_parameter(parameter_name).requires_grad_(flag)
            self.model.__dict__.pop(_KEY, None)
            self.chain(self.model).arounds.clear()
        for chain in [chain for chain in self.chains if chain.unused]:
            chain.remove()
            self.chains.remove(chain)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The outermost call of the model: every bank is joined and split once within it."""
        if self.depth == 0:
            for delta in self.deltas:
                delta.bank.open()
                delta.advance()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for delta in self.deltas:
                    delta.bank.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "depth": 0}


@dataclass
class _Opening:
    host: Host

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.host.opened():
            return inner(*args, **kwargs)


def host_of(model: nn.Module) -> Host | None:
    """The host of a model, None if no delta is attached."""
    return model.__dict__.get(_KEY)
