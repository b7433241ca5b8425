"""DeepSeek-V2 and V3: keys and values from one latent vector, experts beside shared ones."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "deepseek",
    Family(
        types=("deepseek_v2", "deepseek_v3"),
        stack="decoder",
        roles={
            "embed_tokens": "embedding",
            # Down to the latent vector and up again: both are projections of the queries.
            "layers.{block}.self_attn.{q_a_proj,q_b_proj,q_proj,o_proj}": (
                "self_attention.{q,q,q,output}"
            ),
            # Keys and values lie head by head in one projection.
            "layers.{block}.self_attn.{kv_a_proj_with_mqa,kv_b_proj}": "self_attention.k&v",
            "layers.{block}.self_attn.{q_a_layernorm,kv_a_layernorm}": "norm",
            "layers.{block}.mlp.{gate,up,down}_proj": "ffn.{gate,up,down}",
            "layers.{block}.mlp.shared_experts.{gate,up,down}_proj": "ffn.{gate,up,down}",
            "layers.{block}.{input_layernorm,post_attention_layernorm}": "norm",
            "norm": "norm",
            "{lm_head,score}": "head",
        },
    ),
)
