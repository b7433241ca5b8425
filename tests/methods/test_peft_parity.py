"""The same mathematics as PEFT 0.21 where PEFT is right, and what differs where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.testing.case import move, named_gradients
from deltatune.testing.families import FAMILIES

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
# PEFT 0.21 asks transformers by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Family, our target, PEFT's module names. PEFT adapts GPT-2's fused projection of queries, keys
# and values as one matrix; ours does the same where the module is named, and gives each of the
# three its own factors where a role is (`attention.q`), which PEFT cannot express.
LORA = [
    ("t5", "attention.q | attention.v", ["q", "v"]),
    ("t5", "block.linear", ["q", "k", "v", "o", "wi", "wo"]),
    ("t5_gated", "ffn", ["wi_0", "wi_1", "wo"]),
    ("bert", "attention.q | attention.v", ["query", "value"]),
    ("bert", "block.linear", ["query", "key", "value", "dense"]),
    ("gpt2", "c_attn", ["c_attn"]),
    ("gpt2", "c_attn | c_proj | c_fc", ["c_attn", "c_proj", "c_fc"]),
    ("llama", "attention.q | attention.v", ["q_proj", "v_proj"]),
    (
        "llama",
        "block.linear",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
]
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def twins(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two copies of one model in float64, so that 1e-6 speaks of the formulas alone."""
    build = FAMILIES[family].build
    return build().double(), build().double()


def named(delta: Delta, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our leaves by PEFT's parameter names, A and B alike [out, in]."""
    return {
        "base_model.model.{}.lora_{}.default.weight".format(*name.split("/")[1:]): value
        for name, value in values.items()
    }


def close(gradient: Tensor, wanted: Tensor | None, tolerance: float) -> None:
    """Asserts that two gradients agree, relative to the largest entry. Ours is kept in float32."""
    assert wanted is not None
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(gradient, wanted.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("family", "at", "modules"), LORA)
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_lora_equals_peft(family: str, at: str, modules: list[str], double: bool) -> None:
    kin = FAMILIES[family]
    mine, theirs = twins(family)
    if not double:
        mine, theirs = mine.float(), theirs.float()
    delta = api.attach(mine, "lora(rank=3, alpha=12.0)", at=at)
    move(delta)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=modules,
        exclude_modules=["pooler.dense"] if family == "bert" else None,
        fan_in_fan_out=family == "gpt2",
    )
    wrapped = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    copies = named(delta, delta.tensors())
    assert set(copies) == set(trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(copies[name])
    logits, expected = kin.logits(mine, kin.batch()), kin.logits(wrapped, kin.batch())
    torch.testing.assert_close(logits, expected, **EXACT)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, gradient in named(delta, named_gradients(delta, 0)).items():
        close(gradient, trained[name].grad, 1e-6 if double else 1e-5)


def test_lora_counts_equal_peft_on_every_family() -> None:
    for family, at, modules in LORA:
        mine, theirs = twins(family)
        skipped = ["pooler.dense"] if family == "bert" else None
        config = peft.LoraConfig(
            r=3, target_modules=modules, exclude_modules=skipped, fan_in_fan_out=family == "gpt2"
        )
        wrapped = peft.get_peft_model(theirs, config)
        assert api.plan(mine, "lora(rank=3)", at).trainable == trainable(wrapped)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def virtual(kind: type[Any], model: PreTrainedModel, task: str, tokens: int) -> Any:
    return peft.get_peft_model(model, kind(task_type=task, num_virtual_tokens=tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_equals_peft_on_decoders(family: str) -> None:
    kin, tokens = FAMILIES[family], 3
    mine, theirs = twins(family)
    delta = api.attach(mine, f"prompt(length={tokens}, start='uniform')")
    wrapped = virtual(peft.PromptTuningConfig, theirs, "CAUSAL_LM", tokens)
    (prompt,) = (p for p in wrapped.parameters() if p.requires_grad)
    with torch.no_grad():
        prompt.copy_(next(iter(delta.tensors().values())))
    # PEFT leaves the prompt's positions in the logits, and its labels to the caller.
    logits, expected = mine(**kin.batch()).logits, wrapped(**kin.batch()).logits[:, tokens:]
    seen = kin.batch()["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected[seen], **EXACT)
    logits[seen].square().mean().backward()
    expected[seen].square().mean().backward()
    (gradient,) = named_gradients(delta, 0).values()
    close(gradient, prompt.grad, 1e-6)


def test_peft_counts_a_prompt_twice_on_encoder_decoders() -> None:
    mine, theirs = twins("t5")
    wrapped = virtual(peft.PromptTuningConfig, theirs, "SEQ_2_SEQ_LM", 3)
    planned = api.plan(mine, "prompt(length=3)").trainable
    # It allocates one prompt for the encoder and one for the decoder, and uses one.
    assert planned == 3 * mine.config.d_model
    assert trainable(wrapped) == 2 * planned


def test_prompt_equals_peft_on_an_encoder_decoder() -> None:
    kin, tokens = FAMILIES["t5"], 3
    mine, theirs = twins("t5")
    delta = api.attach(mine, f"prompt(length={tokens}, start='uniform')")
    wrapped = virtual(peft.PromptTuningConfig, theirs, "SEQ_2_SEQ_LM", tokens)
    (both,) = (p for p in wrapped.parameters() if p.requires_grad)
    with torch.no_grad():  # the first half goes to the encoder, the second is never used
        both[:tokens].copy_(next(iter(delta.tensors().values())))
    batch = kin.batch()
    decoder = batch.pop("decoder_input_ids")
    logits = mine(**batch, decoder_input_ids=decoder).logits
    expected = wrapped(**batch, decoder_input_ids=decoder).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    logits.square().mean().backward()
    expected.square().mean().backward()
    (gradient,) = named_gradients(delta, 0).values()
    assert both.grad is not None
    close(gradient, both.grad[:tokens], 1e-6)
    assert not both.grad[tokens:].any()


def test_peft_lets_the_classifier_read_the_prompt() -> None:
    """BERT's pooler takes the first position: PEFT's prompt, in ours the text's own."""
    kin, tokens = FAMILIES["bert"], 3
    mine, theirs = twins("bert")
    delta = api.attach(mine, f"prompt(length={tokens}, start='uniform')")
    wrapped = virtual(peft.PromptTuningConfig, theirs, "SEQ_CLS", tokens)
    (prompt,) = (p for n, p in wrapped.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        prompt.copy_(next(iter(delta.tensors().values())))
    batch = kin.batch()
    bert = theirs.base_model
    embedded = torch.cat(
        [prompt.expand(4, -1, -1), bert.embeddings.word_embeddings(batch["input_ids"])], 1
    )
    mask = torch.cat([torch.ones(4, tokens, dtype=torch.long), batch["attention_mask"]], dim=1)
    states = bert(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    logits = {first: theirs.classifier(bert.pooler(states[:, first:])) for first in (0, tokens)}
    torch.testing.assert_close(wrapped(**batch).logits, logits[0], **EXACT)
    torch.testing.assert_close(mine(**batch).logits, logits[tokens], **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_equals_peft_where_positions_are_shifted(family: str) -> None:
    kin, tokens = FAMILIES[family], 3
    mine, theirs = twins(family)
    delta = api.attach(mine, f"prefix(length={tokens})")
    wrapped = virtual(peft.PrefixTuningConfig, theirs, "CAUSAL_LM", tokens)
    (flat,) = (p for p in wrapped.parameters() if p.requires_grad)
    leaves = delta.tensors()  # K and V of each block, as PEFT flattens them
    with torch.no_grad():
        flat.copy_(torch.cat(list(leaves.values()), dim=1))
    ids = kin.batch()["input_ids"]
    # PEFT's prefix lies in the cache, so that the text stands at positions from `tokens` on and its
    # queries are turned further against the prefix's keys, which are not turned. Ours leaves the
    # text where it was; told the same positions, the two agree.
    shifted = torch.arange(ids.shape[1]) + tokens
    logits = mine(input_ids=ids, position_ids=shifted[None]).logits
    expected = wrapped(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    assert not torch.allclose(mine(input_ids=ids).logits, expected, rtol=1e-3)
    logits.square().mean().backward()
    expected.square().mean().backward()
    found = named_gradients(delta, 0)
    close(torch.cat([found[name] for name in leaves], dim=1), flat.grad, 1e-6)


def test_prefix_equals_peft_on_bert() -> None:
    kin, tokens = FAMILIES["bert"], 3
    mine, theirs = twins("bert")
    delta = api.attach(mine, f"prefix(length={tokens})")
    wrapped = virtual(peft.PrefixTuningConfig, theirs, "SEQ_CLS", tokens)
    (flat,) = (p for n, p in wrapped.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        flat.copy_(torch.cat(list(delta.tensors().values()), dim=1))
    batch = kin.batch()
    # As above: PEFT counts the positions of the text from behind the prefix.
    shifted = (torch.arange(batch["input_ids"].shape[1]) + tokens)[None]
    logits = mine(**batch, position_ids=shifted).logits
    torch.testing.assert_close(logits, wrapped(**batch).logits, **EXACT)


def test_peft_reaches_one_stack_of_an_encoder_decoder_with_a_prefix() -> None:
    mine, theirs = twins("t5")
    wrapped = virtual(peft.PrefixTuningConfig, theirs, "SEQ_2_SEQ_LM", 3)
    everywhere = api.plan(mine, "prefix(length=3)").trainable
    assert everywhere == 6 * 2 * 3 * 32  # encoder self, decoder self, decoder cross, in 2 blocks
    assert trainable(wrapped) == everywhere / 3
