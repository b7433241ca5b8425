"""Where AdapterHub puts what it adds, in the families that are read, and how it names that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from deltatune.core.errors import ArtefactError

__all__ = ["FAMILIES", "Block", "Family", "Ground", "Spot"]


@dataclass(frozen=True)
class Spot:
    """A sublayer of a block, as AdapterHub's bottlenecks see it.

    Attributes:
        holder: what its tensors' names begin with, behind the path of the block.
        last: its last projection, behind the path of the block.
        norm: the norm behind its residual; "" where the norm is in front of it.
        sublayer: its role.
        ends: whether the block ends behind its residual.
    """

    holder: str
    last: str
    norm: str
    sublayer: str
    ends: bool = False


@dataclass(frozen=True)
class Family:
    """What is where in the blocks of one stack.

    Attributes:
        blocks: the path of the list of them, behind the base model.
        spots: by the key of the configuration that asks for it.
        loras: the projections that can have a LoRA, behind the path of the block, each with "q",
            "k", "v", "qkv", "intermediate" or "output".
        attention: the module whose prefix it is.
    """

    blocks: str
    spots: Mapping[str, Spot]
    loras: Mapping[str, str]
    attention: str


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        family: of its stack.
        stack: "encoder" or "decoder".
        index: within the stack.
        order: within the model, as AdapterHub counts: the encoder first.
        path: behind the base model.
    """

    family: Family
    stack: str
    index: int
    order: int
    path: str

    @property
    def role(self) -> str:
        """The term of a target that names the block."""
        return f"{self.stack}.block[{self.index}]"


_BERT = Family(
    "encoder.layer",
    {
        "mh_adapter": Spot(
            *("attention.output.", "attention.output.dense", "attention.output.LayerNorm"),
            "self_attention",
        ),
        "output_adapter": Spot("output.", "output.dense", "output.LayerNorm", "ffn", True),
    },
    {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
    },
    "attention.self",
)
_GPT2 = Family(
    "h",
    {
        "mh_adapter": Spot("attention_adapters.", "attn.c_proj", "", "self_attention"),
        "output_adapter": Spot("output_adapters.", "mlp.c_proj", "", "ffn", True),
    },
    {"attn.c_attn": "qkv", "mlp.c_fc": "intermediate", "mlp.c_proj": "output"},
    "attn",
)


def _t5(stack: str) -> Family:
    last = 2 if stack == "decoder" else 1
    feed = f"layer.{last}."
    own = Spot("layer.0.", "layer.0.SelfAttention.o", "", "self_attention")
    crossing = Spot("layer.1.", "layer.1.EncDecAttention.o", "", "cross_attention")
    attentions = ["layer.0.SelfAttention"] + (["layer.1.EncDecAttention"] if last == 2 else [])
    return Family(
        f"{stack}.block",
        {
            "mh_adapter": own,
            **({"cross_adapter": crossing} if last == 2 else {}),
            "output_adapter": Spot(feed, f"{feed}DenseReluDense.wo", "", "ffn", True),
        },
        {
            **{f"{name}.{part}": part for name in attentions for part in "qkv"},
            f"{feed}DenseReluDense.wi": "intermediate",
            f"{feed}DenseReluDense.wi_1": "intermediate",
            f"{feed}DenseReluDense.wo": "output",
        },
        "layer.0.SelfAttention",
    )


FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "bert": {"encoder": _BERT},
    "roberta": {"encoder": _BERT},
    "gpt2": {"decoder": _GPT2},
    "t5": {stack: _t5(stack) for stack in ("encoder", "decoder")},
}  #: `model_type` to its stacks


@dataclass(frozen=True)
class Ground:
    """A model as AdapterHub sees it, and how one of its folders calls things.

    Attributes:
        model: the model.
        kind: its `model_type`.
        root: the path of its base model, with a dot; "" where it is one.
        stem: what the names of tensors begin with, in front of paths behind the base model.
        name: of the adapter, which is part of all names of tensors.
        where: the folder's configuration, as errors name it.
        held: the names of its tensors.
    """

    model: nn.Module
    kind: str
    root: str
    stem: str
    name: str
    where: str
    held: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """The features of the residual stream."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def shared(self, leaf: str) -> str:
        """The name of a tensor that all modules share. Raises ArtefactError where it was lost."""
        name = f"{self.stem}shared_parameters.{self.name}.{leaf}"
        if self.kind == "t5" and name not in self.held:
            raise ArtefactError(
                f"{self.where}: AdapterHub does not save what the modules of a T5 share, and reads "
                f"{leaf} as it is drawn anew. What was trained is lost."
            )
        return name

    def blocks(self) -> Iterator[Block]:
        """All blocks, in AdapterHub's order. Raises ArtefactError where there are none."""
        order = 0
        for stack, family in FAMILIES[self.kind].items():
            try:
                held = self.model.get_submodule(self.root + family.blocks)
            except AttributeError:
                raise ArtefactError(
                    f"{self.where}: {type(self.model).__name__} has no {family.blocks}, where "
                    f"AdapterHub's {self.kind} has its blocks. Load the backbone as transformers "
                    "builds it."
                ) from None
            for index, (name, _) in enumerate(held.named_children()):
                yield Block(family, stack, index, order, f"{family.blocks}.{name}")
                order += 1
