"""`a >> b`: trained one after the other; what comes out is their sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.standin import quick
from tests.training.test_kernel import collate, rows_for
from torch import Tensor
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import Expression, parse
from deltatune.core.run import Run
from deltatune.methods import Adapter, BitFit, Head, LoRA, Prompt
from deltatune.testing.families import FAMILIES
from deltatune.training import Steps, fit

METHODS = st.sampled_from([LoRA(rank=2), BitFit(), Adapter(bottleneck=3), Prompt(length=2)])
SUMS = st.lists(METHODS, min_size=1, max_size=3).map(lambda held: Expression(tuple(held)))


@given(st.lists(SUMS, min_size=1, max_size=4))
def test_what_is_written_is_what_is_read(stages: list[Expression]) -> None:
    built = stages[0]
    for stage in stages[1:]:
        built = built >> stage
    assert parse(str(built)) == built
    assert parse(str(built)).at("ffn") == built.at("ffn")
    if len(stages) > 1:
        assert built.stages == tuple(len(stage.methods) for stage in stages)
        assert [built.of_stage(k) for k in range(len(stages))] == [one.methods for one in stages]


def test_parentheses_make_no_difference_and_heads_belong_to_every_stage() -> None:
    built = parse("prompt >> (bitfit >> lora + adapter)") + Head(labels=3)
    assert str(built) == "prompt >> bitfit >> lora + adapter + head(labels=3)"
    assert [built.stage_of(place) for place in range(5)] == [0, 1, 2, 2, None]


@pytest.mark.parametrize(
    "text", ["(lora >> bitfit) + adapter", "lora + (bitfit >> adapter)", "2 * (lora >> bitfit)"]
)
def test_stages_stand_outermost(text: str) -> None:
    with pytest.raises(ConfigurationError, match="Stages are outermost"):
        parse(text)


def test_a_sum_with_stages_does_not_say_when() -> None:
    with pytest.raises(ConfigurationError, match="does not say when"):
        parse("lora >> bitfit") + "adapter"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora(rank=2)", "bitfit"),
        ("prompt(length=2)", "lora(rank=2) + adapter(bottleneck=3)"),
        ("bitfit", "prefix(length=2)"),
        ("adalora(rank=2, final_rank=1, every=2)", "lt_sft(share=0.1)"),
        ("lora(rank=2)", "fish(share=0.1, rows=4)"),
        ("lora_ga(rank=2, rows=4)", "eva(rank=2, rows=4, at='ffn.up')"),
    ],
)
def test_stages_are_deltas_that_are_trained_one_after_the_other(first: str, second: str) -> None:
    """The same bits as two deltas, the second attached when the first is trained."""
    rows, settings = rows_for("t5"), quick(schedule="constant", base_dropout=False)
    apart = FAMILIES["t5"].build()
    deltas = []
    for method in (first, second):
        deltas.append(api.attach(apart, method, seed=1))
        fit(Run(deltas[-1]), rows, collate, settings=settings, budget=Steps(7))
    wanted = deltas[0].tensors() | deltas[1].tensors()

    delta = api.attach(FAMILIES["t5"].build(), f"{first} >> {second}", seed=1)
    after = {}
    for stage in (0, 1):
        delta.stage = stage
        fit(Run(delta), rows, collate, settings=settings, budget=Steps(7))
        after[stage] = delta.tensors()
        after[stage] = {name: value.clone() for name, value in after[stage].items()}
    for name, value in wanted.items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-5)
        if name in deltas[0].tensors():
            assert torch.equal(after[0][name], after[1][name]), name  # not a bit has moved


def test_a_later_stage_does_not_act_before_its_time(tmp_path: Path) -> None:
    kin, model = FAMILIES["t5"], FAMILIES["t5"].build()

    @torch.no_grad()
    def logits(of: PreTrainedModel) -> Tensor:
        return kin.logits(of, kin.batch())

    alone = api.attach(model, "lora(rank=2)", seed=1)
    wanted = logits(model)
    alone.detach()
    delta = api.attach(model, "lora(rank=2) >> prompt(length=3)", seed=1)
    delta.stage = 0
    assert torch.equal(logits(model), wanted)
    delta.stage = None
    whole = logits(model)
    assert not torch.equal(whole, wanted)
    # One artefact, which is the sum.
    other = kin.build()
    api.load(api.save(delta, tmp_path / "delta"), other)
    assert torch.equal(logits(other), whole)
