"""Targets: what a text names on a model."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from deltatune import api
from deltatune.core.errors import TargetError
from deltatune.core.method import Face
from deltatune.core.roles import places
from deltatune.core.target import Role, find_sites, terms, where
from deltatune.testing.families import FAMILIES


def found(family: str, target: str, face: Face = "weight") -> list[str]:
    return [site.name for site in find_sites(FAMILIES[family].build(), target, face)]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return FAMILIES["llama"].build()


ROLES = {
    ("t5", "attention.q"): 6,
    ("t5", "self_attention.q"): 4,
    ("t5", "cross_attention.v"): 2,
    ("t5", "encoder.attention.k"): 2,
    ("t5", "decoder.attention.output"): 4,
    ("t5", "ffn.up"): 4,
    ("t5_gated", "ffn.gate"): 4,
    ("bert", "attention.q | attention.k | attention.v | attention.output"): 8,
    ("gpt2", "attention.q"): 2,
    ("gpt2", "linear"): 12,  # three slices of a fused projection, its output, up, down
    ("llama", "block.linear"): 14,
    ("llama", "head"): 1,
}


@pytest.mark.parametrize(("where_", "count"), ROLES.items(), ids=lambda v: str(v))
def test_roles_name_modules(where_: tuple[str, str], count: int) -> None:
    assert len(found(*where_)) == count


def test_every_linear_module_of_every_family_has_a_place() -> None:
    for name, family in FAMILIES.items():
        model = family.build()
        known = {place.module for place in places(model)}
        linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert linear <= known, name


def test_slices_of_blocks() -> None:
    each = [found("t5", f"encoder.block[{k}].ffn.down") for k in (0, 1)]
    assert found("t5", "encoder.block[-1].ffn.down") == each[1]
    assert found("t5", "encoder.block[0:1].ffn.down") == each[0]
    assert found("t5", "encoder.block[::-1].ffn.down") == each[0] + each[1]
    assert len(found("t5", "block[1:].ffn.down")) == 2  # one in each stack
    assert found("t5", "encoder.block[1/2:].ffn.down") == each[1]
    assert found("t5", "encoder.block[:3/4].ffn.down") == each[0]  # of one and a half: one
    assert found("t5", "encoder.block[-1/2:].ffn.down") == each[1]
    whole = found("t5", "encoder.block[0]", "select")
    assert all(name.startswith("encoder.block.0.") for name in whole) and len(whole) == 9
    # A weight method takes the linear modules of a block and leaves its norms and tables.
    assert len(found("t5", "encoder.block[0]")) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        *("block[7].ffn.down", "block[-]", "block[]", "block[::0]", "block[1,2]", "blocks[0]"),
        *("block[1/2]", "block[1/0:]", "block[:1/4].ffn.down", "block[::1/2]"),
    ],
)
def test_a_slice_that_names_no_block_is_refused(wrong: str) -> None:
    with pytest.raises(TargetError, match="matches nothing"):
        found("t5", wrong)


@given(st.integers(1, 60), st.integers(1, 8))
def test_shares_of_blocks_part_them(count: int, parts: int) -> None:
    bounds = [Role.parse(f"block[{k}/{parts}:{k + 1}/{parts}]") for k in range(parts)]
    named = [sorted(role.blocks(count)) for role in bounds if role is not None]
    assert list(itertools.chain(*named)) == list(range(count))
    assert len(named) == parts and max(map(len, named)) - min(map(len, named)) <= 1


def test_union_in_the_order_of_the_model_without_repeats() -> None:
    one = found("llama", "attention.v | attention.q | attention.q")
    assert one == found("llama", "attention.q | attention.v")
    assert [name.rsplit(".", 1)[1] for name in one] == ["q_proj", "v_proj"] * 2


def test_names_globs_patterns_types() -> None:
    q = found("llama", "attention.q")
    assert found("llama", "q_proj") == found("llama", "self_attn.q_proj") == q
    assert found("llama", q[0]) == q[:1]
    assert found("llama", "*.0.*.q_proj") == q[:1]
    assert found("llama", r"re:.*\.(q|v)_proj") == found("llama", "attention.q | attention.v")
    assert found("llama", "ffn.up | re:.*(q|v)_proj") == found(
        "llama", "ffn.up | attention.q | attention.v"
    )
    assert found("llama", "type:LlamaMLP", "output") == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert terms("a | re:b|c") == ("a", "re:b|c")


def test_patterns_classes_and_predicates_become_text(llama: PreTrainedModel) -> None:
    mlp = where(LlamaMLP)
    assert mlp == "type:LlamaMLP"
    assert where(re.compile(r".*\.Q_proj", re.IGNORECASE)) == r"re:(?i).*\.Q_proj"

    def narrow(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.out_features == 16

    text = where(narrow, llama)
    assert [s.name for s in find_sites(llama, text, "weight")] == found(
        "llama", "attention.k | attention.v"
    )
    assert api.plan(llama, "lora(rank=2)", text).trainable > 0
    with pytest.raises(TargetError, match="found none"):
        where(lambda name, module: False, llama)
    with pytest.raises(TargetError, match="asked of a model"):
        where(narrow)


def test_nothing_matched_names_what_is_near() -> None:
    with pytest.raises(TargetError, match=r"'atention.q' matches nothing.*attention") as caught:
        found("llama", "atention.q")
    assert "q_proj" in str(caught.value)
    with pytest.raises(TargetError, match=r"'ffn.gate' matches nothing"):
        found("t5", "ffn.up | ffn.gate")  # one good term does not hide a bad one
    with pytest.raises(TargetError, match="not a regular expression"):
        found("llama", "re:(")


def test_spans_go_from_the_input_of_a_sublayer_to_its_output() -> None:
    sites = find_sites(FAMILIES["t5_gated"].build(), "attention | ffn", "output")
    assert len(sites) == 10
    span = next(s for s in sites if s.name == "decoder.block[1].cross_attention")
    assert span.path.endswith("EncDecAttention.o")
    assert span.entry is not None and span.entry[0].endswith("EncDecAttention.q")


def test_fused_slices_have_their_own_rows_and_cannot_be_selected_apart() -> None:
    model = FAMILIES["gpt2"].build()
    sites = find_sites(model, "attention.v", "weight")
    assert [site.rows for site in sites] == [(64, 96)] * 2
    assert torch.equal(sites[0].weight(), model.transformer.h[0].attn.c_attn.weight.T[64:])
    with pytest.raises(TargetError, match="fuses 3 projections"):
        find_sites(model, "attention.v", "select")


def test_a_weight_method_refuses_what_is_not_linear(llama: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match="needs a linear weight"):
        api.plan(llama, "lora", "norm")


def test_biases_are_created_beside_weights_only(llama: PreTrainedModel) -> None:
    planned = api.plan(llama, "bitfit", "*.layers.0.*")  # containers and activations match too
    made = {type(llama.get_submodule(site.path)).__name__ for site in planned.sites if site.count}
    assert made == {"Linear", "LlamaRMSNorm"}
    attention, ffn, norms = 32 + 16 + 16 + 32, 48 + 48 + 32, 2 * 32
    assert planned.trainable == attention + ffn + norms
