"""A delta: an expression of methods bound to a model, with its tensors.

The user keeps calling the backbone. A delta is attached to it, is active until told otherwise, and
leaves the model as it was found when it is detached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.errors import ConfigurationError, StateError
from deltatune.core.grammar import Expression
from deltatune.core.host import Host, host_of
from deltatune.core.in_place import InPlaceBank
from deltatune.core.layout import Part, Sharing, layout, leaves_of, shared_names
from deltatune.core.link import Link
from deltatune.core.merging import Kept, merge, unmerge
from deltatune.core.mixing import join
from deltatune.core.per_thread import PerThread
from deltatune.core.rows import Rows
from deltatune.core.seam import SEAMS
from deltatune.core.text import check_unread, follow, forget

__all__ = ["Delta", "check_alike", "deltas_of"]

_ALONE = Rows((0,))


class Delta(nn.Module):
    """Methods bound to a model, with K slots of their tensors. Made by `attach`.

    Attributes:
        expression: the methods of slot 0.
        bank: the tensors.
        seeds: one for each slot; initial values and dropout are keyed by it.
        step: the training step, which keys dropout.
        steps: of slots that count their own.
        saved: slot to the folder it was last saved to or loaded from, with the digest of what it
            held then.
        origins: slot to what the files of another library said of it, if it began there; `save`
            keeps it among the facts.
    """

    def __init__(
        self,
        host: Host,
        expressions: Sequence[Expression],
        parts: Sequence[Part],
        seeds: Sequence[int],
        sharing: Sharing = "none",
    ) -> None:
        super().__init__()
        self.__dict__["host_"] = host
        self.expressions = tuple(expressions)
        self.parts = tuple(parts)
        self.seeds = tuple(seeds)
        self.name = str(expressions[0])
        self.stage: int | None = None
        self.stages = [self.expression.stage_of(place) for place in range(len(parts))]
        self._enabled = PerThread(True)
        self.merged_slot: int | None = None
        self.__dict__["kept_weights"] = {}
        self.attached = False
        self.saved: dict[int, tuple[str, str]] = {}
        self.origins: dict[int, dict[str, Any]] = {}
        self.step = 0
        self.steps: dict[int, int] = {}
        self.keyed = False
        self._route: PerThread[Rows | None] = PerThread(None)
        self._seen: tuple[object, ...] | None = None
        device = next(host.model.parameters()).device
        leaves = leaves_of(parts)
        self.bank: Bank | InPlaceBank
        shared = shared_names(parts, sharing)
        if parts[0].method.in_place:
            self.bank = InPlaceBank(host.model, parts[0].key)
        else:
            place = torch.device("cpu") if device.type == "meta" else device
            self.bank = Bank(leaves, len(seeds), place, shared)
        self.links = [
            Link(self, part.key, stage, part.method.at_site(site), site, names, forms)
            for stage, part in zip(self.stages, parts, strict=True)
            for site, names, forms in zip(part.sites, part.names, part.forms, strict=True)
        ]
        join(parts, self.links)
        self.training = False

    @property
    def host(self) -> Host:
        """The host it was attached to; outside of the module tree, so that the base is no child of
        the delta.
        """
        host: Host = self.__dict__["host_"]
        return host

    @property
    def kept_weights(self) -> Kept:
        """While it is merged: (path, name) to what stood there before; no tensors of its own."""
        kept: Kept = self.__dict__["kept_weights"]
        return kept

    @property
    def model(self) -> nn.Module:
        """The model it is attached to."""
        return self.host.model

    @property
    def expression(self) -> Expression:
        """The methods of slot 0."""
        return self.expressions[0]

    @property
    def merged(self) -> bool:
        """Whether one of its slots stands in the backbone's weights."""
        return self.merged_slot is not None

    @property
    def routed(self) -> tuple[int | None, ...] | None:
        """The slot of each row within a `route`; None outside of one."""
        route = self._route.get()
        return None if route is None else route.slots

    @property
    def enabled(self) -> bool:
        """Whether it is switched on for this thread."""
        return self._enabled.get()

    @property
    def slots(self) -> int:
        """K, the number of deltas in the bank."""
        return self.bank.count

    @property
    def dropping(self) -> bool:
        """Whether dropout applies: the model or the delta is in training mode."""
        return self.training or self.model.training

    @property
    def rows(self) -> Rows:
        """The slot of each row of the batch."""
        route = self._route.get()
        if route is not None:
            return route
        if self.slots == 1:
            return _ALONE
        raise StateError(
            f"The delta {self.name} has {self.slots} slots, and the batch is not routed. "
            "Say which row uses which slot: `with delta.route([0, 1, ...]):`."
        )

    def check_slot(self, slot: int) -> None:
        """Raises ConfigurationError for a slot that is not there."""
        if not 0 <= slot < self.slots:
            raise ConfigurationError(
                f"There is no slot {slot}: {self.name} has {self.slots}, counted from 0."
            )

    def check_recomputation(self) -> None:
        """A checkpointed block that runs again in the backward pass must find what it ran with.

        Raises StateError if the delta was routed, switched or stepped in between.
        """
        if self.host.depth or torch._C._current_graph_task_id() < 0:
            return
        if self._seen is not None and self._seen != self._condition:
            raise StateError(
                f"{self.name} was routed, switched or stepped between the forward pass and the "
                "backward pass of a checkpointed model, which computes anew. Call backward() "
                "within the same `with`."
            )

    @property
    def _condition(self) -> tuple[object, ...]:
        steps = self.step, tuple(self.steps.items())
        return self._route.get(), self.enabled, self.merged, self.dropping, steps

    def advance(self) -> None:
        """An outermost forward begins. Counts training steps, unless a training loop sets them."""
        if self.dropping and torch.is_grad_enabled() and not self.keyed:
            self.step += 1
        self._seen = self._condition

    @contextmanager
    def route(self, rows: Sequence[int | None]) -> Iterator[None]:
        """Within it, row i of this thread's batches uses slot `rows[i]`; None leaves the row to the
        backbone alone.

        Beams and flattened tokens follow their row. Raises ConfigurationError for a slot that is
        not there.
        """
        for slot in rows:
            if slot is not None:
                self.check_slot(slot)
        with self._route.set(Rows(tuple(rows))):
            yield

    @contextmanager
    def active(self, on: bool = True) -> Iterator[None]:
        """Within it the delta acts for this thread (or, with `on=False`, does not); then it is as
        it was before.

        Raises StateError where it cannot be switched off: it is merged, or trains in place.
        """
        if isinstance(self.bank, InPlaceBank) and not on:
            raise StateError(
                f"{self.name} trains the backbone itself, which cannot be switched off. Detach it."
            )
        if self.merged and not on:
            raise StateError(
                f"{self.name} is merged into the weights, where it always acts. Unmerge it first."
            )
        with self._enabled.set(on):
            yield

    def freeze(self, slot: int | None = None, *, frozen: bool = True) -> None:
        """Takes one slot, or all of them, out of training, or with `frozen=False` back into it.

        A frozen slot acts as before. What the slots share is frozen with all of them, or by
        `freeze_shared`. Raises ConfigurationError for a slot that is not there, and
        StateError for a control that trains in place.
        """
        if isinstance(self.bank, InPlaceBank):
            raise StateError(f"{self.name} trains the backbone itself. Detach it to stop that.")
        if slot is not None:
            self.check_slot(slot)
        for row in self.bank.parameters() if slot is None else [self.bank.slots[slot]]:
            row.requires_grad_(not frozen)
            row.grad = None

    def freeze_shared(self, *, frozen: bool = True) -> None:
        """Takes what the slots share out of training, or with `frozen=False` back into it.

        Raises StateError if they share nothing.
        """
        if isinstance(self.bank, InPlaceBank) or self.bank.shared is None:
            raise StateError(
                f"The slots of {self.name} share nothing. Attach it with sharing='method'."
            )
        self.bank.shared.requires_grad_(not frozen)
        self.bank.shared.grad = None

    @property
    def shares(self) -> bool:
        """Whether its slots have trained leaves in common."""
        return isinstance(self.bank, Bank) and self.bank.shared is not None

    def is_frozen(self, slot: int) -> bool:
        """Whether a slot is out of training."""
        return not self.bank.slots[slot].requires_grad

    def trains(self, stage: int | None) -> bool:
        """Whether what belongs to a stage is trained just now. `delta.stage` is the one that is;
        those behind it do not act yet, and those before it act and stay as they are.
        """
        return self.stage is None or stage is None or stage == self.stage

    @property
    def trained_parts(self) -> list[Part]:
        """The parts that are trained just now."""
        both = zip(self.stages, self.parts, strict=True)
        return [part for stage, part in both if self.trains(stage)]

    def step_of(self, slot: int) -> int:
        """The number of the step that a slot takes: its draws depend on it."""
        return self.steps.get(slot, self.step)

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """The trained and fixed leaves of one slot by full name, detached."""
        return {name: value.detach() for name, value in self.bank.read(slot).items()}

    def redraw(self, slot: int, seed: int, expression: Expression | None = None) -> None:
        """Sets one slot to the initial values of a seed, which keys its dropout from now on. What
        it shares with other slots stays as it is.

        Args:
            slot: which.
            seed: see `attach`.
            expression: what the slot holds from now on, where its `slot_fields` are others.

        Raises ConfigurationError for a slot that is not there or an expression that does not fit
        the bank, and StateError for a control that trains in place.
        """
        self.check_slot(slot)
        if isinstance(self.bank, InPlaceBank):
            raise StateError(f"{self.name} trains the backbone itself, which is not drawn.")
        expression = self.expressions[slot] if expression is None else expression
        check_alike([self.expression, expression])
        self.bank.draw(slot, leaves_of(layout(self.model, expression)), seed, shared=False)
        self.expressions = (*self.expressions[:slot], expression, *self.expressions[slot + 1 :])
        self.seeds = (*self.seeds[:slot], seed, *self.seeds[slot + 1 :])
        self.saved.pop(slot, None)
        self.origins.pop(slot, None)

    def install(self) -> None:
        """Puts the links in their chains."""
        host = self.host
        host.deltas.append(self)
        self.attached = True
        for face, links in self._seamed().items():
            SEAMS[face].install(host, links)
        for link in self.links:
            if link.method.face in SEAMS:
                continue
            chain = host.chain(link.site.module)
            (chain.entries if link.weighs_tokens else chain.links).append(link)
            if link.site.entry is not None:
                host.chain(link.site.entry[1]).entries.append(link)
        follow(host, [link for link in self.links if link.method.reads()])
        check_unread(host)

    def detach(self) -> None:
        """Takes the delta off the model; in any order, and after the last one the model is as it
        was.

        Raises StateError if it is merged or not attached.
        """
        host = self.host
        if not self.attached:
            raise StateError(f"{self.name} is not attached.")
        if self.merged:
            raise StateError(f"{self.name} is merged. Call unmerge() before detach().")
        for face, links in self._seamed().items():
            SEAMS[face].remove(host, links)
        forget(host, self.links)
        for chain in host.chains:
            chain.links = [link for link in chain.links if link.delta is not self]
            chain.entries = [link for link in chain.entries if link.delta is not self]
        if isinstance(self.bank, InPlaceBank):
            self.bank.restore()
        host.deltas.remove(self)
        self.attached = False
        host.sweep()

    def _seamed(self) -> dict[str, list[Link]]:
        found: dict[str, list[Link]] = {}
        for link in self.links:
            if link.method.face in SEAMS:
                found.setdefault(link.method.face, []).append(link)
        return found

    def dead_sites(self) -> list[str]:
        """Sites whose module no forward has called since the delta was attached, unless all that
        they hold is tied to what one has called.
        """
        called = {id(chain.module) for chain in self.host.chains if chain.called}
        alive = [link for link in self.links if id(link.site.module) in called]
        used = {name for link in alive for name in link.names.values()}
        return [
            link.site.name
            for link in self.links
            if link.method.face not in SEAMS
            and id(link.site.module) not in called
            and not (link.method.face == "select" and used.issuperset(link.names.values()))
        ]

    def merge(self, slot: int = 0) -> None:
        """Writes one slot into the backbone's weights, so that it costs nothing at inference.

        Raises:
            UnsupportedError: a part acts on activations, creates a bias, or writes a tied weight.
            StateError: it is merged already or switched off, or a delta before it acts on the same
                weights.
            ConfigurationError: there is no such slot.
        """
        self.check_slot(slot)
        merge(self, slot)

    def unmerge(self) -> None:
        """Puts the weights back bit for bit. Raises StateError if another delta was merged after
        it.
        """
        unmerge(self)

    def extra_repr(self) -> str:
        """What its repr says."""
        return f"{self.name}, slots={self.slots}, trainable={self.bank.numel:,}"


def deltas_of(model: nn.Module) -> tuple[Delta, ...]:
    """The deltas attached to a model, in order."""
    host = host_of(model)
    return () if host is None else tuple(host.deltas)


def check_alike(expressions: Sequence[Expression]) -> None:
    """Raises ConfigurationError for expressions that do not fit one bank."""
    plain = dict.fromkeys(expression.without_slot_fields() for expression in expressions)
    if len(plain) > 1:
        raise ConfigurationError(
            "The slots of one bank hold one method each of the same shape; found "
            f"{', '.join(map(str, plain))}. Attach different methods as different deltas."
        )
