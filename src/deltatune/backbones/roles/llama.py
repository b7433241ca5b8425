"""Llama: rotary positions, grouped-query widths, a gated feed-forward, no biases."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "llama",
    Family(
        types=("llama",),
        stack="decoder",
        roles={
            "embed_tokens": "embedding",
            "layers.{block}.self_attn.{q,k,v,o}_proj": "self_attention.{q,k,v,output}",
            "layers.{block}.mlp.{gate,up,down}_proj": "ffn.{gate,up,down}",
            "layers.{block}.{input_layernorm,post_attention_layernorm}": "norm",
            "norm": "norm",
            "{lm_head,score}": "head",
        },
    ),
)
