"""DeBERTa-v2 and v3: BERT's blocks, with attention to contents and to relative positions apart."""

from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "deberta_v2",
    Family(
        types=("deberta-v2",),
        stack="encoder",
        roles={
            "embeddings.{word_embeddings,position_embeddings,token_type_embeddings}": "embedding",
            "embeddings.LayerNorm": "norm",
            "encoder.layer.{block}.attention.self.{query,key,value}_proj": "self_attention.{q,k,v}",
            "encoder.layer.{block}.attention.self.{pos_query,pos_key}_proj": "relative",
            "encoder.layer.{block}.attention.output.dense": "self_attention.output",
            "encoder.layer.{block}.intermediate.dense": "ffn.up",
            "encoder.layer.{block}.output.dense": "ffn.down",
            "encoder.layer.{block}.attention.output.LayerNorm": "norm",
            "encoder.layer.{block}.output.LayerNorm": "norm",
            "encoder.{rel_embeddings,LayerNorm}": "relative",
            "encoder.conv.conv": "other",
            "encoder.conv.LayerNorm": "norm",
            "pooler.dense": "pooler",
            "cls.predictions.{decoder,transform.dense,transform.LayerNorm}": "head",
            "lm_predictions.lm_head.{dense,LayerNorm}": "head",
            "{classifier,qa_outputs}": "head",
        },
    ),
)
