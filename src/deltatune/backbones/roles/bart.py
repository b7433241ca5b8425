"""BART and mBART: an encoder-decoder with learned positions and biases everywhere."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "bart",
    Family(
        types=("bart", "mbart"),
        stack="encoder",
        roles={
            "{stack}.{embed_tokens,embed_positions}": "embedding",
            "{stack}.{layernorm_embedding,layer_norm}": "norm",
            "{stack}.layers.{block}.self_attn.{q,k,v,out}_proj": "self_attention.{q,k,v,output}",
            "{stack}.layers.{block}.encoder_attn.{q,k,v,out}_proj": (
                "cross_attention.{q,k,v,output}"
            ),
            "{stack}.layers.{block}.{fc1,fc2}": "ffn.{up,down}",
            "{stack}.layers.{block}.*_layer_norm": "norm",
            "{lm_head,classification_head.dense,classification_head.out_proj,qa_outputs}": "head",
        },
    ),
)
