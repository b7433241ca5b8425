"""Backbones of known shapes with random weights, by libraries that no contender is part of."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

__all__ = ["build"]


def build(kind: str, layers: int) -> Any:
    """BERT-base in float32 ("bert") or TinyLlama in bfloat16 ("llama"), with so many layers; the
    same weights each time.
    """
    torch.manual_seed(0)
    if kind == "bert":
        model: Any = BertModel(BertConfig(num_hidden_layers=layers))
        return model.eval()
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
        return model.eval()
    finally:
        torch.set_default_dtype(torch.float32)
