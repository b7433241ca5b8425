"""The host: what a model knows of the deltas attached to it.

It lies in the instance's `__dict__`, so that copies and pickles of the model carry their own, and
it is gone when the last delta is detached, with every flag as it was found.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.chain import Chain, Inner
from deltatune.core.errors import ConfigurationError
from deltatune.core.fingerprint import Fingerprint, fingerprint
from deltatune.core.per_thread import PerThread
from deltatune.core.quantised import Quantised
from deltatune.core.storage import storage_of
from deltatune.core.text import handed_on
from deltatune.core.whole import is_sharded

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

__all__ = ["DRAWN", "Host", "host_of"]

Marks = list[tuple[weakref.ref[Tensor], int, int]]
_KEY = "_deltatune"
DRAWN = "_deltatune_drawn"  # on a model: paths of modules that its checkpoint did not hold


class Host:
    """The deltas, chains and former flags of one model.

    Attributes:
        labels: of batches that are given to the model without them; a `with host.labels.set(...)`
            says where prompts end, for the methods that read it.
        answers: the labels of the call under way.
        encoded: what the encoder of the call under way hands on beside its output; see `core.text`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.deltas: list[Delta] = []
        self._chains: dict[nn.Module, Chain] = {}
        self.merged: list[Delta] = []
        self._known: dict[tuple[str, ...], tuple[Marks, Fingerprint]] = {}
        self.depth = 0
        self.labels: PerThread[Tensor | None] = PerThread(None)
        self.answers: Tensor | None = None
        self.encoded: dict[str, Tensor] = {}
        self.flags = [
            (module, name, parameter.requires_grad)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._with_buffers = [module for module in model.modules() if module._buffers]
        self._quantised = [
            (module, storage)
            for module, name, _ in self.flags
            if name == "weight" and isinstance(storage := storage_of(module), Quantised)
        ]
        for module, name, _ in self.flags:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        self.lock = threading.RLock()
        model.__dict__[_KEY] = self
        for entrance in self.entrances:
            self.chain(entrance).arounds.append(_Opening(self))

    @property
    def entrances(self) -> list[nn.Module]:
        """Where a forward begins: the model, and the encoder that `generate` calls alone."""
        encoder = getattr(self.model, "get_encoder", None)
        both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return [self.model, encoder()] if both and encoder is not None else [self.model]

    @property
    def chains(self) -> Collection[Chain]:
        """One for each module where a delta acts."""
        return self._chains.values()

    def opens(self, module: nn.Module) -> bool:
        """Whether a forward begins at a module."""
        return any(module is entrance for entrance in self.entrances)

    def chain(self, module: nn.Module) -> Chain:
        """The chain of a module, installed if there is none yet."""
        if module not in self._chains:
            self._chains[module] = Chain(module)
        return self._chains[module]

    def sweep(self) -> None:
        """Removes what no delta uses any more; after the last one, itself."""
        if not self.deltas:
            for module, name, flag in self.flags:
                parameter = module._parameters.get(name)  # another one, where it was sharded since
                if parameter is not None:
                    parameter.requires_grad_(flag)
            self.model.__dict__.pop(_KEY, None)
            for entrance in self.entrances:
                chain = self.chain(entrance)
                chain.arounds = [a for a in chain.arounds if not isinstance(a, _Opening)]
        for chain in [chain for chain in self.chains if chain.unused]:
            chain.remove()
            del self._chains[chain.module]

    def warn_of_drawn(self) -> None:
        """Warns of modules that were drawn at random and that no delta trains."""
        trained = {link.site.path for delta in self.deltas for link in delta.links}
        control = any(delta.expression.in_place for delta in self.deltas)
        lost = [path for path in self.model.__dict__.get(DRAWN, ()) if path not in trained]
        if lost and not control:
            warnings.warn(
                f"{', '.join(lost)} was drawn at random, because the checkpoint has none, and no "
                "delta trains it. Add a head of your own: `+ head(labels=...)`.",
                stacklevel=4,
            )

    def fingerprint(
        self,
        excluded: Collection[str],
        originals: Mapping[str, Tensor],
        like: Fingerprint | None = None,
    ) -> Fingerprint:
        """The fingerprint of the model; see `fingerprint`.

        It is not computed again while torch's counter of changes stands still for every tensor.
        That counter does not see changes through `.data`.
        """
        there = [] if originals else self._tensors()
        kept = self._known.get(tuple(sorted(excluded)))
        known = kept is not None and bool(there) and _unchanged(kept[0], there)
        if kept is not None and known and kept[1].tells(like):
            return kept[1]
        found = fingerprint(self.model, originals=originals, excluded=excluded, like=like)
        if there:
            self._known[tuple(sorted(excluded))] = _marks(there), found
        return found

    def _tensors(self) -> list[Tensor]:
        """All parameters and buffers; none where they are sharded or absent."""
        held: list[Tensor | None] = [m._parameters.get(name) for m, name, _ in self.flags]
        held += [buffer for module in self._with_buffers for buffer in module._buffers.values()]
        for module, storage in self._quantised:
            held += storage.stored(module)
        there = [tensor for tensor in held if tensor is not None]
        apart = any(is_sharded(tensor) or tensor.is_meta for tensor in there)
        return [] if apart else there

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The outermost call of the model: every bank is joined and split once within it.

        A forward keeps notes on what it does, so threads take turns; compiled code is not one.
        """
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self.lock:
            yield from self._opened()

    def _opened(self) -> Iterator[None]:
        if self.depth == 0:
            for delta in self.deltas:
                delta.bank.open()
                delta.advance()
            for chain in self.chains:  # what a forward that failed has left
                for link in chain.entries:
                    link.entry_input = None
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.answers, self.encoded = None, {}
                for delta in self.deltas:
                    delta.bank.close()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return state | {"depth": 0, "_known": {}, "answers": None, "encoded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()


@dataclass
class _Opening:
    host: Host

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = _batch_size(args, kwargs)
        for delta in self.host.deltas:
            routed = delta.routed
            if size is not None and routed is not None and size % len(routed):  # beams repeat rows
                raise ConfigurationError(
                    f"The batch has {size} rows, the routing of {delta.name} {len(routed)}. Route "
                    "every row of the batch."
                )
        with self.host.opened():
            if self.host.depth == 1:
                self.host.answers = kwargs.get("labels", self.host.labels.get())
                self.host.encoded = handed_on(kwargs.get("encoder_outputs"))
            return inner(*args, **kwargs)


def _marks(tensors: Sequence[Tensor]) -> Marks:
    """What changes when a tensor is replaced, moved or changed."""
    return [(weakref.ref(one), one.data_ptr(), one._version) for one in tensors]


def _unchanged(marks: Marks, tensors: Sequence[Tensor]) -> bool:
    return len(marks) == len(tensors) and all(
        held() is one and place == one.data_ptr() and version == one._version
        for (held, place, version), one in zip(marks, tensors, strict=True)
    )


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many rows a model is called with; None where no argument tells."""
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    return next((t.shape[0] for t in given if isinstance(t, Tensor) and t.dim() > 1), None)


def host_of(model: nn.Module) -> Host | None:
    """The host of a model, None if no delta is attached."""
    return model.__dict__.get(_KEY)
