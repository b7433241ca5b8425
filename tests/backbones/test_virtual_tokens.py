"""Prefixes and prompts on models that share configs, change kernels, or run out of positions."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from deltatune import api
from deltatune.core.errors import ConfigurationError, StateError, TargetError, UnsupportedError
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

KIN = FAMILIES["llama"]


def twins() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models that share one config, as two models made from it do."""
    one = KIN.build()
    two = LlamaForCausalLM(one.config).eval()
    assert two.config is one.config
    return one, two


def test_models_that_share_a_config_let_go_of_it_one_by_one() -> None:
    one, two = twins()
    kernel, base = one.config._attn_implementation, KIN.logits(two, KIN.batch())
    first, second = (api.attach(model, "prefix(length=2)") for model in (one, two))
    move(second)
    acting = KIN.logits(two, KIN.batch())
    assert not torch.equal(acting, base)
    first.detach()
    assert torch.equal(KIN.logits(two, KIN.batch()), acting)
    copied = copy.deepcopy(two)
    second.detach()
    assert one.config._attn_implementation == kernel
    assert torch.equal(KIN.logits(two, KIN.batch()), base)
    assert torch.equal(KIN.logits(copied, KIN.batch()), acting)  # the copy has a config of its own


def test_the_model_without_a_prefix_is_untouched_beside_one_that_has_it() -> None:
    one, two = twins()
    base = KIN.logits(two, KIN.batch())
    move(api.attach(one, "prefix(length=2)"))
    assert torch.equal(KIN.logits(two, KIN.batch()), base)


def test_a_kernel_that_is_changed_under_a_prefix_is_noticed() -> None:
    model = KIN.build()
    delta = api.attach(model, "prefix(length=2)")
    model.set_attn_implementation("eager")
    with pytest.raises(StateError, match="from sdpa to eager under a prefix"):
        KIN.logits(model, KIN.batch())
    delta.detach()
    KIN.logits(model, KIN.batch())


def test_a_prefix_needs_an_attention_of_the_registry() -> None:
    model = KIN.build()
    with pytest.raises(TargetError, match="names no attention"):
        api.attach(model, "prefix", "ffn")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="flex_attention"):
        api.attach(model, "prefix")


def test_a_cache_filled_without_the_prompt_is_refused() -> None:
    model = KIN.build()
    delta = api.attach(model, "prompt(length=2)")
    ids = KIN.batch()["input_ids"]
    with delta.active(False):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(StateError, match="filled with no virtual tokens, the delta has 2"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_learned_positions_must_suffice(family: str) -> None:
    kin = FAMILIES[family]
    model = kin.build()
    api.attach(model, "prompt(length=34)")  # 40 positions, 7 tokens of text
    with pytest.raises(ConfigurationError, match="need 41 positions"):
        kin.logits(model, kin.batch())


def test_a_prompt_goes_in_front_of_an_embedding() -> None:
    with pytest.raises(TargetError, match="in front of an embedding"):
        api.attach(KIN.build(), "prompt", "attention")
    with pytest.raises(UnsupportedError, match="goes to the encoder"):
        api.attach(FAMILIES["t5"].build(), "prompt", "decoder.embedding")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_embedding_it_by_hand_gives(family: str) -> None:
    kin = FAMILIES[family]
    model = kin.build()
    batch = kin.batch()
    by_hand = kin.build()
    delta = api.attach(model, "prompt(length=3, start='uniform')")
    (prompt,) = delta.tensors().values()
    embedded = by_hand.get_input_embeddings()(batch.pop("input_ids"))
    mask = batch.pop("attention_mask")
    long = torch.cat([prompt.expand(len(mask), -1, -1), embedded], dim=1)
    if (
        not kin.generates
    ):  # its classifier would read the prompt, where the kernel shows it the text
        states = by_hand.base_model(
            inputs_embeds=long, attention_mask=torch.cat([mask.new_ones(4, 3), mask], 1)
        ).last_hidden_state
        mine = model.base_model(**kin.batch()).last_hidden_state
        text = mask[..., None]  # RoBERTa gives padding no position of its own
        torch.testing.assert_close(mine * text, states[:, 3:] * text, rtol=1e-4, atol=1e-5)
        return
    logits = by_hand(
        inputs_embeds=long, attention_mask=torch.cat([mask.new_ones(4, 3), mask], 1), **batch
    ).logits
    expected = logits[:, 3:] * mask[..., None] if kin.decoder_only else logits
    torch.testing.assert_close(kin.logits(model, kin.batch()), expected, rtol=1e-4, atol=1e-5)
