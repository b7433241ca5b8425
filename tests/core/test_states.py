"""Random walks through the states of deltas, against a reference that knows nothing of the kernel.

The model is two linear maps and a tanh; the reference computes every row by itself from copies of
all leaves. After each step the logits, the status, the gradients and the backbone's bytes must be
those of the reference, and whatever it calls illegal must be refused.

`make fuzz` walks 10,000 sequences; the suite a few.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn import functional

from deltatune import api
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import ConfigurationError, DeltatuneError, StateError, UnsupportedError
from deltatune.core.status import DeltaStatus, SlotStatus, status
from deltatune.testing.case import close_gradients, marks, move, named_gradients

SEQUENCES = int(os.environ.get("DELTATUNE_SEQUENCES", "40"))
WIDTH, INNER, WORDS, MOST = 4, 6, 9, 4
IDS = torch.tensor([[1, 2], [3, 4], [5, 8]])
METHODS = {
    "lora": "lora(rank=2, at='ffn.up | ffn.down')",
    "bitfit": "bitfit(at='ffn.up | ffn.down')",
    "adapter": "adapter(bottleneck=3, at='ffn')",
}
RATE = 0.01


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, INNER)
        self.fc2 = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Feed()])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(eq=False)
class Twin:
    """What the reference knows of one delta."""

    real: Delta
    kind: str
    slots: list[dict[str, Tensor]]
    attached: bool = True
    switches: list[bool] = field(default_factory=list)
    routes: list[tuple[int | None, ...]] = field(default_factory=list)
    contexts: list[tuple[str, AbstractContextManager[None]]] = field(default_factory=list)
    merged: int | None = None
    frozen: set[int] = field(default_factory=set)
    saved: dict[int, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        return self.switches[-1] if self.switches else True

    @property
    def lost(self) -> bool:
        """Whether a batch does not know which slot to use."""
        return self.enabled and self.merged is None and len(self.slots) > 1 and not self.routes

    def slot(self, row: int) -> int | None:
        if self.merged is not None:
            return self.merged
        if not self.enabled:
            return None
        return self.routes[-1][row] if self.routes else 0

    def leaf(self, slot: int, ending: str) -> Tensor:
        (found,) = [v for name, v in self.slots[slot].items() if name.endswith(ending)]
        return found

    def status(self) -> DeltaStatus:
        count = sum(leaf.numel() for leaf in self.slots[0].values())
        return DeltaStatus(
            name=self.real.name,
            attached=self.attached,
            active=self.attached and (self.enabled or self.merged is not None),
            merged=self.merged,
            rows=self.routes[-1] if self.routes else None,
            slots=tuple(
                SlotStatus(
                    trainable=0 if slot in self.frozen else count,
                    saved=self.saved[slot][0] if slot in self.saved else None,
                    changed=slot in self.saved and not equal(self.saved[slot][1], leaves),
                )
                for slot, leaves in enumerate(self.slots)
            ),
        )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def copied(delta: Delta, slot: int) -> dict[str, Tensor]:
    return {n: v.detach().clone().requires_grad_() for n, v in delta.bank.read(slot).items()}


class States(RuleBasedStateMachine):
    """Every transition, legal or not, on up to four deltas and those that were detached."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.marks = marks(self.model)
        self.twins: list[Twin] = []
        self.gone: list[Twin] = []
        self.merges: list[Twin] = []
        self.folders: list[tuple[Path, str, dict[str, Tensor]]] = []
        self.place = Path(tempfile.mkdtemp())

    # The reference.

    def row(self, row: int) -> Tensor:
        base, feed = self.base, "layers.0."
        W1, b1 = base[feed + "fc1.weight"], base[feed + "fc1.bias"]
        W2, b2 = base[feed + "fc2.weight"], base[feed + "fc2.bias"]
        adapters = []
        for twin in self.twins:
            slot = twin.slot(row)
            if slot is None:
                continue
            if twin.kind == "lora":
                W1 = W1 + 8 * twin.leaf(slot, "fc1/B") @ twin.leaf(slot, "fc1/A")
                W2 = W2 + 8 * twin.leaf(slot, "fc2/B") @ twin.leaf(slot, "fc2/A")
            elif twin.kind == "bitfit":
                b1, b2 = b1 + twin.leaf(slot, "fc1/bias"), b2 + twin.leaf(slot, "fc2/bias")
            else:
                adapters.append([twin.leaf(slot, name) for name in ("/D", "/c", "/U", "/e")])
        x = base["words.weight"][IDS[row]]
        y = torch.tanh(x @ W1.T + b1) @ W2.T + b2
        for D, c, U, e in adapters:
            y = y + functional.gelu(y @ D.T + c) @ U.T + e
        return x + y

    def expected(self) -> Tensor:
        return torch.stack([self.row(row) for row in range(len(IDS))])

    def may_merge(self, twin: Twin) -> type[DeltatuneError] | None:
        if not twin.attached or twin.merged is not None or not twin.enabled:
            return StateError
        if twin.kind == "adapter":
            return UnsupportedError
        # An adapter acts behind the second map, whose chain it shares.
        earlier = self.twins[: self.twins.index(twin)]
        return StateError if any(other.merged is None for other in earlier) else None

    # What is drawn.

    def pick(self, number: int) -> Twin:
        every = [*self.twins, *self.gone]
        return every[number % len(every)]

    some = precondition(lambda self: bool(self.twins or self.gone))
    room = precondition(lambda self: len(self.twins) < MOST)
    which = st.integers(0, 7)

    # The transitions.

    @room
    @rule(kind=st.sampled_from(sorted(METHODS)), slots=st.integers(1, 2), seed=st.integers(0, 9))
    def attach(self, kind: str, slots: int, seed: int) -> None:
        delta = api.attach(self.model, METHODS[kind], slots=slots, seed=seed)
        self.twins.append(Twin(delta, kind, [copied(delta, slot) for slot in range(slots)]))
        self.same_logits()  # a fresh delta is the identity
        move(delta, seed)
        self.twins[-1].slots = [copied(delta, slot) for slot in range(slots)]

    @some
    @rule(number=which)
    def detach(self, number: int) -> None:
        twin = self.pick(number)
        if not twin.attached or twin.merged is not None:
            with pytest.raises(StateError):
                twin.real.detach()
            return
        twin.real.detach()
        twin.attached = False
        self.twins.remove(twin)
        self.gone = [*self.gone[-1:], twin]

    @some
    @rule(number=which, slot=st.integers(0, 2))
    def merge(self, number: int, slot: int) -> None:
        twin = self.pick(number)
        wrong = ConfigurationError if slot >= len(twin.slots) else self.may_merge(twin)
        if wrong is not None:
            with pytest.raises(wrong):
                twin.real.merge(slot)
            return
        twin.real.merge(slot)
        twin.merged = slot
        self.merges.append(twin)

    @some
    @rule(number=which)
    def unmerge(self, number: int) -> None:
        twin = self.pick(number)
        if not self.merges or self.merges[-1] is not twin:
            with pytest.raises(StateError):
                twin.real.unmerge()
            return
        twin.real.unmerge()
        self.merges.pop().merged = None

    @some
    @rule(number=which, on=st.booleans())
    def switch(self, number: int, on: bool) -> None:
        twin = self.pick(number)
        context = twin.real.active(on)
        if twin.merged is not None and not on:
            with pytest.raises(StateError):
                context.__enter__()
            return
        context.__enter__()
        twin.switches.append(on)
        twin.contexts.append(("switches", context))

    @some
    @rule(number=which, rows=st.lists(st.sampled_from([None, 0, 1]), min_size=3, max_size=3))
    def route(self, number: int, rows: list[int | None]) -> None:
        twin = self.pick(number)
        context = twin.real.route(rows)
        if any(slot is not None and slot >= len(twin.slots) for slot in rows):
            with pytest.raises(ConfigurationError):
                context.__enter__()
            return
        context.__enter__()
        twin.routes.append(tuple(rows))
        twin.contexts.append(("routes", context))

    @some
    @rule(number=which)
    def leave(self, number: int) -> None:
        twin = self.pick(number)
        if twin.contexts:
            kind, context = twin.contexts.pop()
            context.__exit__(None, None, None)
            getattr(twin, kind).pop()

    @some
    @rule(number=which, slot=st.sampled_from([None, 0, 1]), frozen=st.booleans())
    def freeze(self, number: int, slot: int | None, frozen: bool) -> None:
        twin = self.pick(number)
        if slot is not None and slot >= len(twin.slots):
            with pytest.raises(ConfigurationError):
                twin.real.freeze(slot, frozen=frozen)
            return
        twin.real.freeze(slot, frozen=frozen)
        chosen = set(range(len(twin.slots))) if slot is None else {slot}
        twin.frozen = twin.frozen | chosen if frozen else twin.frozen - chosen

    @precondition(lambda self: not any(twin.lost for twin in self.twins))
    @rule()
    def train(self) -> None:
        """One step of gradient descent: the gradients are the reference's, all else stays."""
        for twin in self.twins:
            for leaves in twin.slots:
                for leaf in leaves.values():
                    leaf.grad = None
            for parameter in twin.real.parameters():
                parameter.grad = None
        loss, wanted = self.model(IDS).square().sum(), self.expected().square().sum()
        if loss.requires_grad:
            loss.backward()
        if wanted.requires_grad:
            wanted.backward()
        for twin in self.twins:
            for slot, leaves in enumerate(twin.slots):
                live = twin.merged is None and slot not in twin.frozen
                row = twin.real.bank.slots[slot]
                if row.grad is not None:
                    assert live
                    found = named_gradients(twin.real, slot)
                    with torch.no_grad():
                        row -= RATE * row.grad.sign()  # steps that cannot run away
                for name, leaf in leaves.items():
                    grad = leaf.grad if live and leaf.grad is not None else torch.zeros_like(leaf)
                    if row.grad is None:
                        assert not grad.any()
                    else:
                        close_gradients(found[name], grad)
                # Rounding must not pile up: both go on from the same bits.
                twin.slots[slot] = copied(twin.real, slot) if row.grad is not None else leaves

    @some
    @rule(number=which, slot=st.integers(0, 1))
    def save(self, number: int, slot: int) -> None:
        twin = self.pick(number)
        slot %= len(twin.slots)
        folder = api.save(twin.real, self.place / str(len(self.folders)), slot=slot)
        snapshot = {name: leaf.detach().clone() for name, leaf in twin.slots[slot].items()}
        twin.saved[slot] = (str(folder), snapshot)
        self.folders.append((folder, twin.kind, snapshot))

    @room
    @precondition(lambda self: bool(self.folders))
    @rule(number=which)
    def load(self, number: int) -> None:
        folder, kind, snapshot = self.folders[number % len(self.folders)]
        delta = api.load(folder, self.model)
        twin = Twin(delta, kind, [copied(delta, 0)], saved={0: (str(folder), snapshot)})
        assert equal(twin.slots[0], snapshot)
        self.twins.append(twin)

    # What always holds.

    @invariant()
    def same_logits(self) -> None:
        if any(twin.lost for twin in self.twins):
            with pytest.raises(StateError):
                self.model(IDS)
            return
        with torch.no_grad():
            torch.testing.assert_close(self.model(IDS), self.expected(), rtol=1e-4, atol=1e-4)

    @invariant()
    def same_status(self) -> None:
        assert status(self.model).deltas == tuple(twin.status() for twin in self.twins)
        assert str(status(self.model))
        assert deltas_of(self.model) == tuple(twin.real for twin in self.twins)
        for twin in self.gone:
            assert DeltaStatus.of(twin.real) == twin.status()

    @invariant()
    def the_backbone_is_kept(self) -> None:
        if not self.merges:
            state = self.model.state_dict()
            assert equal(self.base, state) and list(state) == list(self.base)
        assert not any(p.requires_grad for p in self.model.parameters()) or not self.twins

    def teardown(self) -> None:
        for twin in reversed(self.merges):
            twin.real.unmerge()
        for twin in self.twins:
            twin.real.detach()
        assert equal(self.base, self.model.state_dict())
        assert marks(self.model) == self.marks
        shutil.rmtree(self.place)


TestStates = States.TestCase
TestStates.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
