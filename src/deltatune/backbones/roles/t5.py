"""T5, v1.0 and gated v1.1, and its kin."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "t5",
    Family(
        types=("t5", "mt5", "umt5"),
        stack="encoder",
        roles={
            "{stack}.embed_tokens": "embedding",
            "{stack}.block.{block}.layer.*.SelfAttention.{q,k,v,o}": (
                "self_attention.{q,k,v,output}"
            ),
            "{stack}.block.{block}.layer.*.EncDecAttention.{q,k,v,o}": (
                "cross_attention.{q,k,v,output}"
            ),
            "{stack}.block.{block}.layer.*.DenseReluDense.{wi,wi_1,wi_0,wo}": (
                "ffn.{up,up,gate,down}"
            ),
            "{stack}.block.{block}.layer.*.layer_norm": "norm",
            "{stack}.final_layer_norm": "norm",
            "{stack}.block.{block}.layer.*.SelfAttention.relative_attention_bias": "relative",
            "{lm_head,classifier,classification_head.dense,classification_head.out_proj}": "head",
        },
    ),
)
