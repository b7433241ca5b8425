"""GPT-2: `Conv1D` storage, queries, keys and values fused in one projection."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "gpt2",
    Family(
        types=("gpt2",),
        stack="decoder",
        roles={
            "{wte,wpe}": "embedding",
            "h.{block}.attn.c_attn": "self_attention.q+k+v",
            "h.{block}.attn.c_proj": "self_attention.output",
            "h.{block}.mlp.{c_fc,c_proj}": "ffn.{up,down}",
            "h.{block}.{ln_1,ln_2}": "norm",
            "ln_f": "norm",
            "{lm_head,score,classifier}": "head",
        },
    ),
)
