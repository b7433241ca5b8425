from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import api
from deltatune.backbones.encoding import Row, RowOfSeveral
from deltatune.backbones.load import Backbone, load_backbone
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.core.run import Run
from deltatune.training import Mixture, Settings, Steps, fit, fit_tasks
from deltatune.training.batch import visited
from deltatune.training.tasks import _Routed, averaged

ANSWERS = {"first": ("red", "blue"), "second": ("blue", "red"), "third": ("red", "red")}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("t5-nano")


def rows(task: str, count: int) -> list[dict[str, Any]]:
    """Texts whose answer follows from a word, by a rule of each task's own."""
    tokenizer = load_backbone("t5-nano").tokenizer
    made = []
    for number in range(count):
        good = number % 2
        text = f"{'nothing ' * (number % 3)}{'good' if good else 'bad'} film {number}"
        answer = ANSWERS[task][good]
        made.append(
            {
                "input_ids": tokenizer(text).input_ids,
                "labels": tokenizer(answer).input_ids,
            }
        )
    return made


def collate(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row["input_ids"]) for row in chosen], batch_first=True)
    labels = [torch.tensor(row["labels"]) for row in chosen]
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def mixture(**options: Any) -> Mixture:
    return Mixture({"first": rows("first", 20), "second": rows("second", 9)}, **options)


def quick(**changed: Any) -> Settings:
    return Settings(
        **{"learning_rate": 1e-2, "per_device_batch_size": 4, "checkpoint_every": 5, **changed}
    )


def test_averages() -> None:
    found = averaged({"a": {"ACC": 0.5, "F1": 0.1}, "b": {"EM": 1.0}})
    assert found == {"average": 0.75, "a/ACC": 0.5, "a/F1": 0.1, "b/EM": 1.0}


def test_one_delta_on_several_tasks_is_fit_on_their_mixture(backbone: Backbone) -> None:
    delta = api.attach(backbone.model, "lora(rank=2)", seed=1)
    found = fit_tasks(delta, mixture(), collate, settings=quick(), budget=Steps(6))
    ended = delta.tensors()
    delta.detach()
    other = api.attach(backbone.model, "lora(rank=2)", seed=1)
    expected = fit(Run(other), mixture(), collate, settings=quick(), budget=Steps(6))
    assert found.losses == expected.losses
    assert all(torch.equal(ended[name], value) for name, value in other.tensors().items())
    other.detach()


def test_the_average_of_the_tasks_decides(backbone: Backbone, tmp_path: Path) -> None:
    """Scores that pull apart: the best step is that of the best average, and is gone back to."""
    scripted = {"first": iter([0.9, 0.1, 0.2]), "second": iter([0.0, 0.9, 0.3])}
    kept: list[dict[str, Tensor]] = []
    delta = api.attach(backbone.model, "lora(rank=2)")

    def score(task: str) -> dict[str, float]:
        if task == "first":
            kept.append({name: value.clone() for name, value in delta.tensors().items()})
        return {"ACC": next(scripted[task]), "other": 1.0}

    result = fit_tasks(
        delta,
        mixture(),
        collate,
        settings=quick(evaluation_every=2),
        budget=Steps(6),
        validate={name: lambda name=name: score(name) for name in scripted},  # type: ignore[misc]
        folder=tmp_path,
    )
    assert [point.scores["average"] for point in result.history] == [0.45, 0.5, 0.25]
    assert result.history[0].scores["first/other"] == 1.0
    assert (result.best_step, result.kept_step, result.best_score) == (4, 4, 0.5)
    assert all(torch.equal(kept[1][name], value) for name, value in delta.tensors().items())
    delta.detach()


def by_slot(delta: Delta, given: Mixture, **options: Any) -> Any:
    return fit_tasks(delta, given, collate, settings=quick(**options), budget=Steps(8))


@pytest.mark.parametrize("changed", [{}, {"packing": True}, {"tokens_per_pass": 12}])
def test_a_slot_for_each_task_learns_from_its_rows_alone(
    backbone: Backbone, changed: dict[str, Any]
) -> None:
    """What slot k ends with is what it ends with when the other's rows are something else."""
    ends = []
    for other in ("second", "third"):
        bank = api.attach(backbone.model, "lora(rank=2)", slots=2)
        given = Mixture({"first": rows("first", 20), "other": rows(other, 9)}, mixed=True)
        before = [bank.tensors(slot) for slot in (0, 1)]
        before = [{name: value.clone() for name, value in one.items()} for one in before]
        # The mean of a batch is over all its tokens: answers of one length keep the shares.
        assert {len(row["labels"]) for row in given} == {len(given[0]["labels"])}
        by_slot(bank, given, **changed)
        ends.append(bank.tensors(0))
        for slot in (0, 1):
            moved = bank.tensors(slot)
            assert any(not torch.equal(moved[name], v) for name, v in before[slot].items())
        bank.detach()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-5)


def test_each_task_is_validated_as_its_slot_has_it(backbone: Backbone) -> None:
    bank = api.attach(backbone.model, "lora(rank=2)", slots=2)
    seen: dict[str, Any] = {}

    def score(task: str) -> dict[str, float]:
        seen[task] = bank.routed
        return {"ACC": 0.0}

    fit_tasks(
        bank,
        mixture(),
        collate,
        settings=quick(),
        budget=Steps(1),
        validate={name: lambda name=name: score(name) for name in ("first", "second")},  # type: ignore[misc]
    )
    assert seen == {"first": (0,), "second": (1,)}
    bank.detach()


def test_what_does_not_fit_is_refused(backbone: Backbone) -> None:
    bank = api.attach(backbone.model, "lora(rank=2)", slots=3)
    with pytest.raises(ConfigurationError, match="2 tasks have one slot for all of them or one"):
        by_slot(bank, mixture())
    bank.detach()
    bank = api.attach(backbone.model, "adalora", slots=2)
    with pytest.raises(UnsupportedError, match="adalora acts on every step of its slot"):
        by_slot(bank, mixture())
    bank.detach()
    delta = api.attach(backbone.model, "lora(rank=2)")
    with pytest.raises(UnknownNameError, match="Did you mean 'first'"):
        fit_tasks(
            delta,
            mixture(),
            collate,
            settings=quick(),
            budget=Steps(1),
            validate={"frist": lambda: {"ACC": 0.0}},
        )
    delta.detach()


class Interrupted(Exception):
    """Ends a run from within."""


def test_a_run_of_slots_that_share_goes_on_with_the_same_bits(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Interrupted between checkpoints, with a parameter that both slots move."""

    def end(folder: Path, cut: int | None = None) -> list[Tensor]:
        calls = iter(range(1000))
        scores = iter([0.1, 0.9, 0.2, 0.3])

        def collated(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            if next(calls) == cut:
                raise Interrupted
            return collate(chosen)

        bank = api.attach(
            backbone.model, "poly(rank=2, experts=3)", slots=2, seed=3, sharing="method"
        )
        try:
            result = fit_tasks(
                bank,
                mixture(mixed=True, temperature=2.0),
                collated,
                settings=quick(evaluation_every=6, checkpoint_every=4),
                budget=Steps(12),
                validate={"first": lambda: {"ACC": next(scores)}},
                folder=folder,
            )
            assert result.kept_step == 12
            return [parameter.detach().clone() for parameter in bank.bank.parameters()]
        finally:
            bank.detach()

    with pytest.raises(Interrupted):
        end(tmp_path / "cut", cut=7)
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    found, expected = end(tmp_path / "cut"), end(tmp_path / "whole")
    assert len(found) == 3 and all(map(torch.equal, found, expected))


def test_a_routed_row_keeps_its_other_right_answers() -> None:
    several = RowOfSeveral((1, 2), (3,), None, (Row((1, 2), (4,)),))
    seen = {visited(_Routed(1, several), 13, step, 0) for step in range(20)}
    assert {(one.slot, one.row.labels) for one in seen} == {(1, (3,)), (1, (4,))}
    assert visited(_Routed(1, Row((1,), (3,))), 13, 0, 0).row == Row((1,), (3,))
