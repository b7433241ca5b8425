from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.standin import StandIn, quick
from torch import nn
from transformers.optimization import (
    Adafactor,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.training import Epochs, Seconds, Steps, Tokens
from deltatune.training.optim import (
    build_optimiser,
    clip,
    optimiser_names,
    schedule_factor,
    warmup_fraction,
)
from deltatune.training.settings import SCHEDULES

TWINS = {
    "constant": lambda optimiser, warmup, total: get_constant_schedule_with_warmup(
        optimiser, warmup
    ),
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_those_of_transformers(schedule: str, warmup: int) -> None:
    total = 23
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    twin = TWINS[schedule](optimiser, warmup, total)
    expected = []
    for _ in range(total):
        expected.append(twin.get_last_lr()[0])
        optimiser.step()
        twin.step()
    settings = quick(schedule=schedule, warmup_steps=warmup)
    fraction = warmup_fraction(settings, Steps(total), 5)
    found = [schedule_factor(schedule, step / total, fraction) for step in range(total)]
    assert found == pytest.approx(expected, abs=1e-9)


@given(st.sampled_from(SCHEDULES), st.floats(0, 1, exclude_max=True), st.floats(0, 0.99))
def test_a_factor_is_a_fraction(schedule: str, done: float, warmup: float) -> None:
    assert 0.0 <= schedule_factor(schedule, done, warmup) <= 1.0


def test_warm_up_is_counted_in_the_budgets_own_way() -> None:
    assert warmup_fraction(quick(warmup_steps=3), Steps(12), 5) == 0.25
    assert warmup_fraction(quick(warmup_ratio=0.1), Steps(12), 5) == 2 / 12
    assert warmup_fraction(quick(warmup_ratio=0.1), Epochs(2), 5) == 0.1
    assert warmup_fraction(quick(warmup_ratio=0.1), Seconds(9), 5) == 0.1
    with pytest.raises(ConfigurationError, match=r"warmup_steps.*9 tokens.*warmup_ratio"):
        warmup_fraction(quick(warmup_steps=3), Tokens(9), 5)
    with pytest.raises(ConfigurationError, match=r"12 steps leaves nothing of the budget of 12"):
        warmup_fraction(quick(warmup_steps=12), Steps(12), 5)


@pytest.mark.parametrize("name", optimiser_names())
def test_every_optimiser_by_name(name: str) -> None:
    if name == "muon":
        with pytest.raises(ConfigurationError, match="2D"):
            build_optimiser(StandIn(), quick(optimiser=name))
        return
    optimiser = build_optimiser(StandIn(), quick(optimiser=name, learning_rate=0.5))
    assert type(optimiser).__name__.lower() == name
    assert [group["lr"] for group in optimiser.param_groups] == [0.5, 0.5]


def test_adamw_is_fused_and_takes_its_arguments() -> None:
    settings = quick(betas=(0.8, 0.9), weight_decay=0.3, optimiser_options={"eps": 1e-5})
    decayed, others = build_optimiser(StandIn(), settings).param_groups
    assert decayed["fused"] and decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-5
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    unfused = quick(optimiser_options={"fused": False})
    assert not build_optimiser(StandIn(), unfused).param_groups[0]["fused"]


def test_adafactor_obeys_the_learning_rate() -> None:
    optimiser = build_optimiser(StandIn(), quick(optimiser="adafactor"))
    assert isinstance(optimiser, Adafactor)
    group = optimiser.param_groups[0]
    assert not group["scale_parameter"] and not group["relative_step"]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"optimiser": "adamv"}, UnknownNameError, "'adamv'.*'adam'"),
        ({"optimiser": "lbfgs"}, UnknownNameError, "'lbfgs'"),
        ({"optimiser_options": {"esp": 1.0}}, UnknownNameError, "'adamw' 'esp'.*'eps'"),
        ({"optimiser": "sgd", "betas": (0.9, 0.9)}, UnknownNameError, "'betas'"),
        ({"optimiser": "rprop", "weight_decay": 0.1}, ConfigurationError, "no weight decay"),
        ({"optimiser_options": {"lr": 1.0}}, ConfigurationError, "setting of its own"),
        ({"optimiser_options": {"eps": -1.0}}, ConfigurationError, "refuses.*epsilon"),
    ],
)
def test_wrong_optimisers_are_refused(values: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        build_optimiser(StandIn(), quick(**values))


def with_gradients(*groups: tuple[object, list[list[float]]]) -> torch.optim.Optimizer:
    """An optimiser whose groups have these slots (None: no such key) and gradients."""
    made = []
    for slot, gradients in groups:
        parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        made.append({"params": parameters, **({} if slot is None else {"slot": slot})})
    return torch.optim.SGD(made, lr=0.1)


def gradients(optimiser: torch.optim.Optimizer) -> list[list[float]]:
    return [p.grad.tolist() for group in optimiser.param_groups for p in group["params"]]


def test_each_slot_is_clipped_by_itself() -> None:
    optimiser = with_gradients((0, [[3.0], [0.0]]), (0, [[4.0]]), (1, [[0.5]]), (2, [[10.0]]))
    assert clip(optimiser, 1.0) == 10.0
    expected = [[0.6], [0.0], [0.8], [0.5], [1.0]]
    assert gradients(optimiser) == [pytest.approx(gradient) for gradient in expected]


def test_a_group_without_slot_is_clipped_by_itself() -> None:
    optimiser = with_gradients((None, [[3.0]]), (None, [[0.5]]))
    clip(optimiser, 1.0)
    assert gradients(optimiser) == [[1.0], [0.5]]


def test_one_slot_is_clipped_as_torch_does_it() -> None:
    torch.manual_seed(0)
    values = [torch.randn(5).tolist() for _ in range(3)]
    ours, theirs = with_gradients((0, values)), with_gradients((0, values))
    norm = clip(ours, 0.7)
    parameters = theirs.param_groups[0]["params"]
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(parameters, 0.7)))
    for found, expected in zip(gradients(ours), gradients(theirs), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_told_and_nothing_is_changed(bad: float) -> None:
    optimiser = with_gradients((0, [[5.0]]), (1, [[bad]]))
    assert not math.isfinite(clip(optimiser, 1.0))
    assert gradients(optimiser)[0] == [5.0]


def test_parameters_without_gradients_are_left_out() -> None:
    optimiser = with_gradients((0, [[5.0]]))
    optimiser.param_groups[0]["params"][0].grad = None
    assert clip(optimiser, 1.0) == 0.0
    assert clip(with_gradients((0, [[5.0]])), None) == 5.0
