"""BERT."""

from deltatune.core.roles import FAMILIES, Family

BLOCKS = {
    "embeddings.{word_embeddings,position_embeddings,token_type_embeddings}": "embedding",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{block}.attention.self.{query,key,value}": "self_attention.{q,k,v}",
    "encoder.layer.{block}.attention.output.dense": "self_attention.output",
    "encoder.layer.{block}.crossattention.self.{query,key,value}": ("cross_attention.{q,k,v}"),
    "encoder.layer.{block}.crossattention.output.dense": "cross_attention.output",
    "encoder.layer.{block}.intermediate.dense": "ffn.up",
    "encoder.layer.{block}.output.dense": "ffn.down",
    "encoder.layer.{block}.*.output.LayerNorm": "norm",
    "encoder.layer.{block}.output.LayerNorm": "norm",
    "pooler.dense": "pooler",
}

FAMILIES.add(
    "bert",
    Family(
        types=("bert",),
        stack="encoder",
        roles={
            **BLOCKS,
            "cls.predictions.{decoder,transform.dense,transform.LayerNorm}": "head",
            "cls.predictions": "head",
            "{classifier,qa_outputs,cls.seq_relationship}": "head",
        },
    ),
)
