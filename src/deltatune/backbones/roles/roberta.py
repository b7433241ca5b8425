"""RoBERTa and its kin: BERT's blocks under other heads."""

from deltatune.backbones.roles.bert import BLOCKS
from deltatune.core.roles import FAMILIES, Family

FAMILIES.add(
    "roberta",
    Family(
        types=("roberta", "xlm-roberta", "camembert"),
        stack="encoder",
        roles={
            **BLOCKS,
            "lm_head.{dense,layer_norm,decoder}": "head",
            "classifier.{dense,out_proj}": "head",
            "{lm_head,classifier,qa_outputs}": "head",
        },
    ),
)
