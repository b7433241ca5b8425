"""Searches without gradients: on functions with a known minimum, and on a task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tests.composition.plain import Plain, change
from torch import Tensor
from torch.nn import functional

from deltatune import api
from deltatune.backbones.encoding import collate, encode
from deltatune.backbones.load import load_backbone
from deltatune.composition import (
    Change,
    add,
    as_delta,
    blackbox,
    effective,
    in_slots,
    lorahub,
    prompt_of,
    write_prompt,
)
from deltatune.composition.evolution import minimise
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, TrainingError
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES

pytest.importorskip("cma", reason="cma is not installed")

SEARCH = {"evaluations": 400, "population": 8, "sigma": 0.5, "bound": 3.0, "seed": 0}
POINT = np.array([1.0, -2.0, 0.5])


def test_the_minimum_is_found_and_repeats_without_the_global_generator() -> None:
    state = np.random.get_state()[1].copy()
    found = [
        minimise(lambda x: np.square(x - POINT).sum(1), np.zeros(3), **SEARCH) for _ in range(2)
    ]
    assert np.abs(found[0].point - POINT).max() < 1e-3
    assert (found[0].point == found[1].point).all() and found[0].history == found[1].history
    assert list(found[0].history) == sorted(found[0].history, reverse=True)
    assert found[0].history[0] == np.square(POINT).sum() and found[0].evaluations <= 400
    assert (np.random.get_state()[1] == state).all()


def test_no_point_leaves_the_bound_and_the_budget_is_kept() -> None:
    seen: list[np.ndarray] = []

    def losses(points: np.ndarray) -> np.ndarray:
        seen.extend(points)
        return -points.sum(1)

    found = minimise(losses, np.zeros(3), **{**SEARCH, "evaluations": 100})
    assert np.abs(np.stack(seen)).max() <= 3.0 and len(seen) == found.evaluations <= 100
    assert found.point.sum() > 7


def test_losses_that_are_not_finite() -> None:
    def half(points: np.ndarray) -> list[float]:
        return [float("nan") if x[0] > 0.5 else float(np.square(x + 1).sum()) for x in points]

    assert np.abs(minimise(half, np.zeros(2), **SEARCH).point + 1).max() < 1e-2
    with pytest.raises(TrainingError, match="No loss of a generation is finite"):
        minimise(lambda x: [float("inf")] * len(x), np.zeros(2), **SEARCH)
    with pytest.raises(ConfigurationError, match="need as many losses"):
        minimise(lambda x: [0.0, 1.0], np.zeros(2), **SEARCH)
    with pytest.raises(ConfigurationError, match="2 dimensions"):
        minimise(lambda x: x.sum(1), np.zeros(1), **SEARCH)


def attached(change: Change) -> Delta:
    return as_delta(change).delta


def test_lorahub_finds_the_weights_of_a_sum() -> None:
    """The objective is the distance from 1.2 a - 0.7 b; dense parts and products alike."""
    model = Plain()
    a, b = attached(change(2, model)), attached(change(3, model))
    wanted = add([effective(a), effective(b)], [1.2, -0.7])
    acting: list[bool] = []

    def distance(made: Delta) -> float:
        acting.append(a.enabled or b.enabled)
        off = effective(made) - wanted
        return float(sum(value.square().sum() for value in off.values()))

    found = lorahub([a, b], distance, evaluations=300, penalty=0.0)
    assert found.weights == pytest.approx((1.2, -0.7), abs=1e-2)
    assert not any(acting) and a.enabled
    assert api.deltas_of(model) == (a, b, found.composed.delta)
    reached = effective(found.composed.delta)
    for name, value in add([effective(a), effective(b)], found.weights).items():
        torch.testing.assert_close(reached[name], value, rtol=1e-4, atol=1e-4)
    assert found.history[0] == pytest.approx(
        float(sum(v.square().sum() for v in wanted.values())), rel=1e-5
    )


def test_lorahub_of_slots_with_a_rank_above_the_widths() -> None:
    """Three LoRAs of rank 3 on maps of width 5 and 6: side by side they pass every width."""
    model = Plain()
    held = api.attach(model, "lora(rank=3, at='one | two')", slots=3)
    move(held)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), held.route([1]):
        wanted = model(x)

    def loss(made: Delta) -> float:
        with torch.no_grad():
            return float((model(x) - wanted).square().mean())

    found = lorahub([(held, k) for k in range(3)], loss, evaluations=400, penalty=0.0, rank=3)
    assert found.loss < 1e-3 * found.history[0]
    assert found.weights == pytest.approx((0.0, 1.0, 0.0), abs=0.1)
    with pytest.raises(ConfigurationError, match="at least two"):
        lorahub([held], loss)


def test_a_broken_objective_leaves_the_model_as_it_was() -> None:
    model = Plain()
    a, b = attached(change(2, model)), attached(change(3, model))

    def broken(made: Delta) -> float:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lorahub([a, b], broken)
    assert api.deltas_of(model) == (a, b) and a.enabled


def test_blackbox_reaches_what_lies_in_its_subspace() -> None:
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    wanted: list[Tensor] = []

    def loss(prompts: Tensor) -> Tensor:
        wanted.append(prompts[0])
        target = start + 0.3
        return (prompts - target).square().sum((1, 2))

    found = blackbox(loss, start, dimension=24, evaluations=8001, bound=50.0, scale=3.0)
    assert wanted[0].equal(start)  # it begins at the prompt given
    assert found.loss < 1e-3 * found.history[0] and found.point.shape == (24,)
    assert float((found.prompt - start - 0.3).square().sum()) == pytest.approx(found.loss, rel=1e-3)


def test_the_spread_of_the_projection_does_not_depend_on_the_dimension() -> None:
    start = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    for dimension in (10, 100):
        seen: list[Tensor] = []

        def loss(prompts: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(prompts - start)
            return prompts.sum((1, 2))

        blackbox(loss, start, dimension=dimension, evaluations=41, population=40)
        ratio = float(torch.cat(seen[1:]).std() / start.std())
        assert 0.85 < ratio < 1.15, dimension


def row_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of each row's target tokens, [rows]."""
    logits = model(**batch).logits.float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
    ).view(batch["labels"].shape)
    counted = batch["labels"] != -100
    return (losses * counted).sum(1) / counted.sum(1)


def test_blackbox_lowers_the_loss_of_a_task_in_slots() -> None:
    """Which of two sentences is right, on t5-nano: eight rows, ten prompts in every batch."""
    from deltatune.tasks import find_task

    backbone = load_backbone("t5-nano")
    examples = find_task("minimal_pairs").load(None, "clean").train[:8]
    rows = encode(
        examples, backbone.tokenizer, "encoder_decoder", maximum_source=64, maximum_target=8
    )
    batch = collate(rows.rows, backbone.tokenizer, "encoder_decoder")
    delta = api.attach(backbone.model, "prompt(length=4)", slots=10)
    objective = in_slots(delta, batch, lambda held: row_loss(backbone.model, held))
    start = prompt_of(delta)
    one_by_one = []
    for slot in range(3):
        with torch.no_grad(), delta.route([slot]):
            one_by_one.append(row_loss(backbone.model, batch).mean())
    together = objective(torch.stack([prompt_of(delta, slot) for slot in range(3)]))
    close(torch.as_tensor(together), torch.stack(one_by_one))
    found = blackbox(objective, start, dimension=100, evaluations=201, population=10, scale=3.0)
    assert found.loss < 0.95 * found.history[0] and found.evaluations == 201
    write_prompt(delta, found.prompt, 0)
    with torch.no_grad(), delta.route([0]):
        reached = row_loss(backbone.model, batch).mean()
    assert float(reached) == pytest.approx(found.loss, rel=1e-4)


def test_what_cannot_be_searched_is_refused() -> None:
    model = FAMILIES["t5"].build()
    lora, prompt = api.attach(model, "lora(rank=2)"), api.attach(model, "prompt(length=2)", slots=2)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ConfigurationError, match="a prompt that is alone"):
        in_slots(lora, batch, lambda held: held["input_ids"])
    with pytest.raises(ConfigurationError, match="as many slots"):
        in_slots(prompt, batch, lambda held: held["input_ids"])(torch.zeros(3, 2, 32))
    with pytest.raises(ConfigurationError, match=r"holds prompts of \(2, 32\)"):
        write_prompt(prompt, torch.zeros(3, 32))
    with pytest.raises(ConfigurationError, match="entries that differ"):
        blackbox(lambda prompts: prompts.sum((1, 2)), torch.zeros(2, 4))
