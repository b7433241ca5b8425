"""Heads: in the bank, as wide as the widest label set, narrower ones masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltatune import api
from deltatune.core.errors import ConfigurationError, TargetError
from deltatune.core.grammar import parse
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["bert"]  # three outputs


def test_masked_labels_get_no_probability() -> None:
    model = KIN.build()
    delta = api.attach(model, "lora + head(labels=2)")
    move(delta)
    chance = KIN.logits(model, KIN.batch()).softmax(-1)
    assert not chance[:, 2].any() and torch.allclose(chance[:, :2].sum(-1), torch.ones(4))


def test_tasks_of_different_widths_in_one_bank_equal_separate_runs() -> None:
    batch = KIN.batch(rows=5)
    model = KIN.build()
    bank = api.attach(model, ["lora + head(labels=2)", "lora + head(labels=3)"], seed=[3, 4])
    move(bank)
    rows = [0, 1, 1, 0, None]
    labels = torch.tensor([0, 2, 1, 1, 0])
    with bank.route(rows):
        mixed = KIN.logits(model, batch)
        losses = torch.nn.functional.cross_entropy(mixed, labels, reduction="none")
        losses.sum().backward()
    close(mixed[4], KIN.logits(KIN.build(), batch)[4])
    for slot, wide in ((0, 2), (1, 3)):
        alone = KIN.build()
        delta = api.attach(alone, f"lora + head(labels={wide})", seed=3 + slot)
        delta.bank.write(0, bank.bank.read(slot))
        mine = [row for row, used in enumerate(rows) if used == slot]
        theirs = KIN.logits(alone, {name: value[mine] for name, value in batch.items()})
        close(mixed[mine], theirs)
        torch.nn.functional.cross_entropy(theirs, labels[mine], reduction="sum").backward()
        close(bank.bank.slots[slot].grad, delta.bank.slots[0].grad)


def test_a_head_is_saved_and_stands_on_any_head(tmp_path: Path) -> None:
    model = KIN.build()
    delta = api.attach(model, "bitfit + head(labels=2)")
    move(delta)
    api.save(delta, tmp_path / "delta")
    other = KIN.build()
    torch.nn.init.normal_(other.classifier.weight)  # as it is drawn whenever a backbone is loaded
    api.load(tmp_path / "delta", other)
    assert torch.equal(KIN.logits(other, KIN.batch()), KIN.logits(model, KIN.batch()))


def test_a_slot_is_drawn_anew_for_another_head() -> None:
    delta = api.attach(KIN.build(), "lora + head(labels=1, start=2.5)", slots=2)
    name = next(name for name in delta.bank.read(0) if name.endswith("bias"))
    assert delta.bank.read(1)[name].tolist() == [2.5] * 3
    delta.redraw(1, 7, parse("lora + head(labels=3, start=-1.0)"))
    assert delta.bank.read(1)[name].tolist() == [-1.0] * 3
    assert delta.bank.read(0)[name].tolist() == [2.5] * 3
    assert str(delta.expressions[1]) == "lora + head(labels=3, start=-1.0)"
    with pytest.raises(ConfigurationError, match="hold one method each of the same shape"):
        delta.redraw(1, 7, parse("lora(rank=4) + head"))


def test_labels_must_fit() -> None:
    with pytest.raises(TargetError, match="has 3 outputs; 4 labels do not fit"):
        api.attach(KIN.build(), "head(labels=4)")
    with pytest.raises(ConfigurationError, match="at least 1"):
        api.attach(KIN.build(), "head(labels=0)")
