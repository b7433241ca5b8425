"""Counts equal the reference table, on the real shapes, without a single weight."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from deltatune import api

TABLE = Path(__file__).parent.parent / "values" / "golden_counts.csv"
ROWS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))

# Methods of the table that later work brings, or that no method of ours should be.
NO_CROSS = "self_attention | ffn"
LATE = "block[5:].self_attention | block[5:].ffn"
HOUSLBY_SITES = re.compile(r"after every attention output projection \(self.*\) and every FFN.*")

# Generic rows: (method, sites) to an expression; {L}, {m}, ... are read from the hyper-parameters.
GENERIC: dict[tuple[str, str], str] = {
    ("Full fine-tuning", "all"): "full",
    (
        "Houlsby adapter (Compacter-code placement)",
        "after self-attention and FFN only (no cross)",
    ): f"adapter(bottleneck={{m}}, bias={{bias}}, at={NO_CROSS!r})",
    (
        "AdapterDrop (first 5 blocks of each stack)",
        "as Houlsby without cross, blocks >=5",
    ): f"adapter(bottleneck={{m}}, bias={{bias}}, at={LATE!r})",
    ("Pfeiffer (single) adapter", "after every FFN"): "pfeiffer(bottleneck={m}, bias={bias})",
    ("Parallel adapter (FFN)", "parallel to every FFN"): "parallel(bottleneck={m}, bias={bias})",
    ("Prompt tuning", "input embeddings (encoder input for enc-dec)"): "prompt(length={L})",
    (
        "Prefix tuning (no reparameterisation, self only)",
        "K and V of every self-attention",
    ): "prefix(length={L}, at='self_attention')",
    (
        "Prefix tuning (MLP reparameterised, one MLP per stack, self-attention)",
        "self-attention",
    ): "prefix(length={L}, reparameterise=True, middle={mid}, at='self_attention')",
    ("P-tuning v2", "K,V of all self-attentions"): "prefix(length={L}, at='self_attention')",
    ("Intrinsic prompt tuning (stage 2)", "latent vector"): "intrinsic_prompt(dimension={d_I})",
    ("LoRA", "W_q and W_v of every attention"): "lora(rank={r})",
    ("LoRA", "all linear maps in the blocks"): "lora(rank={r}, at='block.linear')",
    (
        "BitFit (bias-free backbone: biases created, init 0)",
        "every linear in the blocks + every RMSNorm",
    ): "bitfit(at='block.linear | norm')",
    (
        "BitFit (bias-free backbone: biases created, init 0)",
        "every linear in the blocks",
    ): "bitfit(at='block.linear')",
    (
        "BitFit",
        "every existing bias incl. LayerNorm, head excluded",
    ): "bitfit(create=False, at='block.linear | norm')",
    ("LN-tuning", "every norm weight (and bias), head norm excluded"): "ln_tuning",
    (
        "Intrinsic SAID",
        "all tensors via random projection + one scale per tensor",
    ): "intrinsic(dimension={d})",
    ("Random-subset tuning", "uniform random coordinates"): "random_subset",
    # Its mask is learned; what it stores is as large.
    ("Diff pruning / fixed sparse mask at 0.5%", "all parameters"): "random_subset",
    ("(IA)3", "K and V outputs of every attention, FFN inner activation"): "ia3",
    ("(IA)3", "k,v of every attention, FFN inner"): "ia3",
    (
        "Compacter",
        "after self-attention and FFN (no cross)",
    ): f"compacter(bottleneck={{reduced}}, at={NO_CROSS!r})",
    ("Compacter++", "after FFN"): "compacter_plus_plus(bottleneck={reduced})",
    (
        "Low-rank adapter",
        "after self-attention and FFN (no cross)",
    ): f"low_rank_adapter(bottleneck={{reduced}}, at={NO_CROSS!r})",
}
BIASES = "bitfit(create=False, at='linear | norm | head')"  # heads included
NORMS = "ln_tuning"
CLASSIFIER = "last_layer(at='head')"
FIVE = "attention.q | attention.k | attention.v | ffn.up | ffn.down"
IA3_OF_PEFT = "attention.k | attention.v | attention.output | ffn.down"

# Rows of single publications, each by its number.
PAPER: dict[str, str] = {
    "G264": "prompt(length=100)",
    "G265": "prompt(length=100)",
    "G266": "prefix(length=5, reparameterise=True, middle=512, bias=False, at='self_attention')",
    "G267": "prefix(length=6, reparameterise=True, middle=512, embedding=512, per='model', "
    "at='self_attention')",
    "G268": "adapter(bottleneck=64, bias=False)",
    "G269": f"lora(rank=8) + {NORMS}",
    "G270": "lora(rank=8)",
    "G271": "adapter(bottleneck=64)",
    "G272": BIASES,
    "G273": f"{BIASES} + adapter(bottleneck=64)",
    "G274": "prompt(length=10)",
    "G275": "prompt(length=10) + adapter(bottleneck=64)",
    "G276": f"prompt(length=10) + {BIASES}",
    "G277": f"prompt(length=10) + {BIASES} + adapter(bottleneck=64)",
    "G278": "lora(rank=8)",
    "G279": "lora(rank=1)",
    "G280": "adapter(bottleneck=1)",
    "G281": "adapter(bottleneck=8)",
    "G282": "prompt(length=264)",
    "G283": "adapter(bottleneck=64, at='block[0].attention | block[0].ffn')",
    "G284": "lora(rank=8)",
    "G285": "lora(rank=8)",
    "G286": "lora(rank=4)",
    "G287": "lora(rank=4)",
    "G288": "lora(rank=16)",
    "G289": f"adapter(bottleneck=24, at={NO_CROSS!r}) + {NORMS}",
    "G290": f"pfeiffer(bottleneck=24) + {NORMS}",
    "G291": f"adapter(bottleneck=24, at={LATE!r}) + {NORMS}",
    "G292": f"low_rank_adapter(at={NO_CROSS!r}) + {NORMS}",
    "G293": f"phm_adapter(terms=12, at={NO_CROSS!r}) + {NORMS}",
    "G294": f"compacter(at={NO_CROSS!r}) + {NORMS}",
    "G295": f"compacter_plus_plus + {NORMS}",
    "G296": "prompt(length=100)",
    "G297": "intrinsic",
    "G298": "bitfit(at='linear | norm | head')",
    "G309": f"adalora + {CLASSIFIER}",
    "G310": f"adalora + {CLASSIFIER}",
    "G299": f"lora(rank=8) + {CLASSIFIER}",
    "G300": f"lora(rank=8) + {CLASSIFIER}",
    "G301": f"bitfit(create=False, at='block.linear | norm') + {CLASSIFIER}",
    "G302": f"bitfit(create=False, at='block.linear | norm') + {CLASSIFIER}",
    "G303": f"prompt(length=20) + {CLASSIFIER}",
    "G304": f"prompt(length=20) + {CLASSIFIER}",
    "G305": f"prefix(length=20) + {CLASSIFIER}",
    "G306": f"prefix(length=20) + {CLASSIFIER}",
    # PEFT scales the input of the attention's output there; the count is that of the output.
    "G307": f"ia3(at={IA3_OF_PEFT!r}) + {CLASSIFIER}",
    "G308": f"ia3(at={IA3_OF_PEFT!r}) + {CLASSIFIER}",
    "G312": "prefix(length=200)",
    "G313": "prefix(length=30) + parallel(bottleneck=512)",
    "G314": "vera(rank=1024)",
    "G315": "vera(rank=256)",
    "G316": "fourierft",
    "G317": "fourierft",
    "G318": f"lora(rank=32, at={FIVE!r})",
    "G319": f"dora(rank=32, at={FIVE!r})",
    "G320": f"dora(rank=16, at={FIVE!r})",
    "G321": "lora(rank=8, at='block.linear')",
    "G322": "prefix(length=10)",
    "G323": "lora(rank=8)",
    "G324": "pfeiffer(bottleneck=48)",
    "G328": "pasta(length=4)",
    "G325": "gate(pfeiffer(bottleneck=48), prefix(length=10))",
    "G326": "gate(pfeiffer(bottleneck=48), prefix(length=10)) + lora(rank=8)",
    "G327": "hadamard + ln_tuning(at='*.attention.output.LayerNorm')",
    "G244": f"dora(rank=32, at={FIVE!r})",
    "G245": "vera(rank=256)",
    "G246": "loha(rank=8)",
    "G248": "lokr(rank=8, factor=16)",
    "G249": "oft(block=32)",
    "G250": "boft(block=8)",
    "G252": "miss(rank=64, at='block.linear')",
    "G253": "c3a(block=256)",
    "G254": "road",
    "G256": "randlora",
    "G257": "vb_lora",
    "G258": "llama_adapter",
    "G260": "p_tuning(length=20, middle=128)",
    "G261": "p_tuning(length=20, encoder='lstm', middle=128)",
}
# Their number of parameters is printed in round figures only.
ROUNDED_BASE = {"deberta-v2-xxl (48 x 1536)", "deberta-v3-base (12 x 768 x 3072)"}


WIDTHS = {
    "t5-small": 512,
    "t5-base": 768,
    "t5-large": 1024,
    "t5-v1_1-base": 768,
    "t5-v1_1-large": 1024,
    "bert-base": 768,
    "roberta-base-cls": 768,
    "roberta-large-mlm": 1024,
    "gpt2": 768,
    "llama-7b": 4096,
}


def expression(row: dict[str, str]) -> str | None:
    """The expression that a row speaks of, None if it has none."""
    if row["id"] in PAPER:
        return PAPER[row["id"]]
    values = dict(re.findall(r"(\w+)=(\w+)", row["hyperparameters"]))
    values["bias"] = values.get("bias", "True")
    values["reduced"] = str(WIDTHS.get(row["model"], 0) // 32)
    method, sites = row["method"], row["sites"]
    if method == "Houlsby adapter" and HOUSLBY_SITES.fullmatch(sites):
        return "adapter(bottleneck={m}, bias={bias})".format(**values)
    if method == "Prefix tuning (no reparameterisation)":
        return "prefix(length={L})".format(**values)
    if method == "Last-layer tuning":
        return "last_layer"
    if method == "BitFit" and sites == "every existing bias incl. LayerNorm and head":
        # A bare BERT has no head but its pooler, which `linear` names.
        return "bitfit(create=False)" if row["model"] == "bert-base" else BIASES
    template = GENERIC.get((method, sites))
    return None if template is None else template.format(**values)


def t5(width: int, feed_forward: int, blocks: int, heads: int, *, gated: bool) -> nn.Module:
    model = T5ForConditionalGeneration(
        T5Config(
            d_model=width,
            d_ff=feed_forward,
            num_layers=blocks,
            num_heads=heads,
            feed_forward_proj="gated-gelu" if gated else "relu",
        )
    )
    if gated:
        # transformers ties every T5; the head of v1.1 is its own.
        model.lm_head = nn.Linear(width, model.config.vocab_size, bias=False)
    return model


def gpt2(width: int, blocks: int, heads: int, positions: int = 1024) -> nn.Module:
    sizes = {"n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def roberta(kind: type[nn.Module], *, large: bool) -> nn.Module:
    sizes = (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096}
        if large
        else {}
    )
    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        **sizes,
    )
    return kind(config)


def deberta(blocks: int, width: int, heads: int, feed_forward: int, **more: object) -> nn.Module:
    return DebertaV2Model(
        DebertaV2Config(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=feed_forward,
            relative_attention=True,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            **more,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5-small": lambda: t5(512, 2048, 6, 8, gated=False),
    "t5-base": lambda: t5(768, 3072, 12, 12, gated=False),
    "t5-large": lambda: t5(1024, 4096, 24, 16, gated=False),
    "t5-v1_1-base": lambda: t5(768, 2048, 12, 12, gated=True),
    "t5-v1_1-large": lambda: t5(1024, 2816, 24, 16, gated=True),
    "t5-v1_1-xxl": lambda: t5(4096, 10240, 24, 64, gated=True),
    "bert-base": lambda: BertModel(BertConfig()),
    "bert-large": lambda: BertModel(
        BertConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
        )
    ),
    "roberta-base-cls": lambda: roberta(RobertaForSequenceClassification, large=False),
    "roberta-large-cls": lambda: roberta(RobertaForSequenceClassification, large=True),
    "roberta-large-mlm": lambda: roberta(RobertaForMaskedLM, large=True),
    "gpt2": lambda: gpt2(768, 12, 12),
    "gpt2-medium": lambda: gpt2(1024, 24, 16),
    "gpt2-large": lambda: gpt2(1280, 36, 20),
    "gpt3-175b": lambda: gpt2(12288, 96, 96, positions=2048),
    "llama-7b": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32000)),
    "bart-large": lambda: BartModel(BartConfig()),
    "deberta-v2-xxl (48 x 1536)": lambda: deberta(48, 1536, 24, 6144, vocab_size=128100),
    "deberta-v3-base (12 x 768 x 3072)": lambda: deberta(12, 768, 12, 3072, vocab_size=128100),
}


@functools.cache
def built(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


MAPPED = [(row, text) for row in ROWS if (text := expression(row)) is not None]


@pytest.mark.parametrize(("row", "text"), MAPPED, ids=[row["id"] for row, _ in MAPPED])
def test_count(row: dict[str, str], text: str) -> None:
    planned = api.plan(built(row["model"]), text)
    assert planned.trainable == int(row["tunable"]), text
    if row["model"] in ROUNDED_BASE:
        return
    assert planned.base == int(row["base_params"])
    assert round(100 * planned.ratio_base, 5) == float(row["pct_of_base"])
    assert round(100 * planned.ratio_total, 5) == float(row["pct_of_base_plus_delta"])
    stored = re.search(r"stored after training: (\d+)", row["hyperparameters"])
    if stored is not None:
        assert planned.stored == int(stored.group(1))


def test_every_row_is_counted() -> None:
    assert [row["id"] for row in ROWS if expression(row) is None] == []
    assert set(PAPER) <= {row["id"] for row in ROWS}
    assert len(ROWS) == 262
