"""Tiny random models of the families that the kernel is held to, with a batch for each.

They have no dropout of their own, so that training mode is as exact as evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from deltatune.core.method import Face

__all__ = ["FAMILIES", "Family"]

_VOCABULARY, _PAD, _END = 97, 0, 1


@dataclass(frozen=True)
class Family:
    """One family in miniature.

    Attributes:
        name: of the family.
        build: makes a random model; the same one every time, in eval mode.
        generates: whether the model generates.
        decoder_only: whether its batches may be padded on the left.
        lacks: faces that it cannot take, and refuses with a sentence.
        shares: whether its blocks compute something once for all rows of a batch, so that some
            sites take one slot for all of them.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    generates: bool = True
    decoder_only: bool = False
    lacks: tuple[Face, ...] = ()
    shares: bool = False

    def batch(self, rows: int = 4, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
        """Token ids [rows, 7], rows 1, 3, ... padded by two; and decoder ids for a decoder."""
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, _VOCABULARY, (rows, 7), generator=random)
        mask = torch.ones_like(ids)
        mask[1::2, : 2 if left else None] = 0 if left else 1
        if not left:
            mask[1::2, 5:] = 0
        ids = ids.masked_fill(mask == 0, _PAD)
        batch = {"input_ids": ids, "attention_mask": mask}
        if not self.decoder_only and self.generates:
            batch["decoder_input_ids"] = torch.randint(2, _VOCABULARY, (rows, 4), generator=random)
        return batch

    def logits(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of a batch, those of padded positions set to zero."""
        logits: Tensor = model(**batch).logits
        if self.decoder_only:
            logits = logits * batch["attention_mask"][..., None]
        return logits


def _build(kind: type[PreTrainedModel], config: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model: Any = kind(copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Random models start with equal norms and zero biases, which hides mistakes.
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()) + len(name)))
        made: PreTrainedModel = model.eval()
        return made

    return build


_SMALL: Mapping[str, Any] = {"vocab_size": _VOCABULARY, "pad_token_id": _PAD}
_ENDS: Mapping[str, Any] = {"bos_token_id": _END, "eos_token_id": _END}
_BLOCKS: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_STEADY: Mapping[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_START: Mapping[str, Any] = {"decoder_start_token_id": _PAD}
_LABELS: Mapping[str, Any] = {"num_labels": 3}


def _t5(feed_forward: str) -> T5Config:
    return T5Config(
        **_SMALL,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj=feed_forward,
        **_START,
        eos_token_id=_END,
        dropout_rate=0.0,
    )


def _bart() -> BartConfig:
    return BartConfig(
        **_SMALL,
        **_ENDS,
        **_START,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        dropout=0.0,
        init_std=0.2,
        forced_eos_token_id=None,
    )


def _encoder(kind: Any, **more: Any) -> PreTrainedConfig:
    fixed = {**_SMALL, **_BLOCKS, **_STEADY, **_LABELS, "max_position_embeddings": 40}
    config: PreTrainedConfig = kind(**fixed, **more)
    return config


def _gpt2() -> GPT2Config:
    return GPT2Config(
        **_SMALL,
        **_ENDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
    )


def _decoder(kind: Any, **more: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = kind(
        **{**_SMALL, **_ENDS, **_BLOCKS, "num_key_value_heads": 2, **more}
    )
    return config


_DISENTANGLED: Mapping[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
# Three of the seven tokens: the window must cut, or nothing of it is tested.
_WINDOW: Mapping[str, Any] = {"sliding_window": 3, "head_dim": 8}
_EXPERTS: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("t5", _build(T5ForConditionalGeneration, _t5("relu"))),
        Family("t5_gated", _build(T5ForConditionalGeneration, _t5("gated-gelu"))),
        Family("bart", _build(BartForConditionalGeneration, _bart())),
        Family(
            "bert", _build(BertForSequenceClassification, _encoder(BertConfig)), generates=False
        ),
        Family(
            "roberta",
            _build(RobertaForSequenceClassification, _encoder(RobertaConfig)),
            generates=False,
        ),
        Family(
            "deberta_v2",
            _build(DebertaV2ForSequenceClassification, _encoder(DebertaV2Config, **_DISENTANGLED)),
            generates=False,
            lacks=("attend",),
            shares=True,
        ),
        Family("gpt2", _build(GPT2LMHeadModel, _gpt2()), decoder_only=True),
        Family("llama", _build(LlamaForCausalLM, _decoder(LlamaConfig)), decoder_only=True),
        Family("qwen2", _build(Qwen2ForCausalLM, _decoder(Qwen2Config)), decoder_only=True),
        Family(
            "mistral",
            _build(MistralForCausalLM, _decoder(MistralConfig, **_WINDOW)),
            decoder_only=True,
        ),
        Family(
            "gemma3",
            _build(
                Gemma3ForCausalLM,
                _decoder(
                    Gemma3TextConfig,
                    **_WINDOW,
                    layer_types=["sliding_attention", "full_attention"],
                ),
            ),
            decoder_only=True,
        ),
        Family(
            "mixtral",
            _build(MixtralForCausalLM, _decoder(MixtralConfig, num_local_experts=4)),
            decoder_only=True,
        ),
        Family(
            "gpt_oss",
            _build(GptOssForCausalLM, _decoder(GptOssConfig, **_WINDOW, **_EXPERTS)),
            decoder_only=True,
            shares=True,
        ),
        Family(
            "deepseek_v3",
            _build(DeepseekV3ForCausalLM, _decoder(DeepseekV3Config, **_LATENT)),
            decoder_only=True,
        ),
    )
}
