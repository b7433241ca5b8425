"""Which kinds of other libraries' folders are read and written, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltatune.core.errors import nearest
from deltatune.interop.dialects.dialect import Dialect
from deltatune.interop.dialects.gains import IA3
from deltatune.interop.dialects.lora import LoRA
from deltatune.interop.dialects.modules import LNTuning
from deltatune.interop.dialects.shared import FourierFT, RandLoRA, VBLoRA, VeRA, WaveFT
from deltatune.interop.dialects.tokens import PrefixTuning, PromptTuning, PTuning, TrainableTokens
from deltatune.interop.dialects.weights import (
    BEFT,
    BOFT,
    C3A,
    HRA,
    OFT,
    DeLoRA,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    MiSS,
    RoAd,
    SHiRA,
)

__all__ = ["ABSENT", "DIALECTS", "HUB_TABLE", "OPEN_TABLE", "TABLE", "Row", "reason"]

_KINDS: tuple[type[Dialect], ...] = (
    *(BEFT, BOFT, C3A, DeLoRA, FourierFT, GraLoRA, HiRA, HRA, IA3, LNTuning, LoHa, LoKr, MiSS),
    *(OFT, PromptTuning, PrefixTuning, PTuning, RandLoRA, RoAd, SHiRA, TrainableTokens),
    *(VBLoRA, VeRA, WaveFT, LoRA),
)

# LoRA is the last: what is a product of two factors, and no other kind takes, is written as LoRA.
DIALECTS: Mapping[str, Dialect] = {kind.kind: kind() for kind in _KINDS}

_OTHER = "deltatune has no such method"
ABSENT: Mapping[str, str] = {
    "ADALORA": "PEFT divides by rank + 1e-5, cuts ranks by masks, and keeps what it needs apart",
    "ADAMSS": _OTHER,
    "ADAPTION_PROMPT": "PEFT adds it behind the output projection, llama_adapter before it",
    "CARTRIDGE": f"{_OTHER}; its keys and values are those of a text",
    "CPT": f"{_OTHER}; its prompt is part of a labelled context",
    "DEFT": _OTHER,
    "FROD": _OTHER,
    "GLORA": _OTHER,
    "LILY": _OTHER,
    "MULTITASK_PROMPT_TUNING": "its calls name a task for each row, where mpt has a slot for it",
    "OSF": _OTHER,
    "PEANUT": _OTHER,
    "POLY": "its calls name a task for each row, where poly has a slot for it",
    "PSOFT": _OTHER,
    "PVERA": _OTHER,
    "SHADOW": _OTHER,
    "SUPERTUNING": _OTHER,
    "TINYLORA": _OTHER,
    "UNILORA": _OTHER,
    "XLORA": "its folder names folders of other deltas, which it weighs",
}  #: kinds that are neither read nor written, with the reason


@dataclass(frozen=True)
class Row:
    """One kind of folder.

    Attributes:
        kind: as the library calls it.
        reads: the methods that it becomes, by name.
        writes: the methods that become it.
        note: what is refused of it, or why all of it is.
    """

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    note: str


TABLE: tuple[Row, ...] = (
    *(Row(one.kind, one.reads, one.writes, one.note) for _, one in sorted(DIALECTS.items())),
    *(Row(kind, (), (), why) for kind, why in sorted(ABSENT.items())),
)  #: every kind that PEFT 0.21 has

HUB_TABLE: tuple[Row, ...] = (
    Row("adapter_plus", ("adapter", "pfeiffer"), (), "its scale is multiplied in"),
    Row("compacter", ("compacter",), (), "not in T5: AdapterHub does not save the shared rule"),
    Row(
        "compacter++",
        ("compacter",),
        (),
        "GPT-2: in BERT the norm is run twice; not in T5, as `compacter`",
    ),
    Row("direft", (), (), "written as `noreft` is, and AdapterHub reads it as that"),
    Row("double_seq_bn", ("adapter",), (), "no norm of its own, no gate"),
    Row("double_seq_bn_inv", ("adapter", "invertible"), (), '`inv_adapter` "nice"'),
    Row("gated", (), (), "`use_gating` averages gates over padding, too"),
    Row("head_one_layer", (), (), "the backbone's classifier has two linear maps"),
    Row(
        "head_two_layers",
        ("lora", "last_layer", "head"),
        (),
        "beside any adapter, on BERT, RoBERTa",
    ),
    Row("ia3", ("ia3",), (), ""),
    Row(
        "lora", ("lora",), (), "no gate; of before 1.1 without its scale, as AdapterHub repairs it"
    ),
    Row("loreft", ("reft",), (), "BERT and RoBERTa: elsewhere generated tokens are edited, too"),
    Row("mam", ("prefix", "parallel"), (), "as its members are"),
    Row("mtl_lora", (), (), "its calls name a task for each row"),
    Row("noreft", (), (), "written as `direft` is"),
    Row("par_bn", ("parallel",), (), "BERT and RoBERTa: elsewhere it reads what no norm has seen"),
    Row(
        "prefix_tuning",
        ("prefix",),
        (),
        "not in T5: relative positions; what its MLP makes is kept",
    ),
    Row("prefix_tuning_flat", ("prefix",), (), "as `prefix_tuning`"),
    Row("prompt_tuning", (), (), "AdapterHub's prompt is behind positions and norm"),
    Row("scaled_par_bn", ("parallel",), (), "its scale is multiplied in"),
    Row("seq_bn", ("pfeiffer",), (), "the norms of a post-norm backbone are stored beside"),
    Row("seq_bn_inv", ("pfeiffer", "invertible"), (), "as `seq_bn`"),
    Row("union", ("lora", "adapter"), (), "as its members are"),
    Row("unipelt", (), (), "`use_gating` averages gates over padding, too"),
    Row("vera", ("lora",), (), "AdapterHub trains whole matrices; not in T5, as `compacter`"),
)  #: configurations of adapters 1.2
OPEN_TABLE: tuple[Row, ...] = (
    Row("adapter", ("adapter",), (), "at linear modules"),
    Row("bitfit", ("bitfit",), (), "backbones with biases; kept as differences, which rounds"),
    Row("compacter", ("phm_adapter",), (), "its products of low rank are multiplied out"),
    Row("lora", ("lora",), (), "at linear modules"),
    Row("low_rank_adapter", ("low_rank_adapter",), (), "rank 1, the only one that OpenDelta has"),
    Row("parallel_adapter", ("parallel",), (), "beside a sublayer without its residual and norm"),
    Row("prefix", ("prefix",), (), "BERT, RoBERTa, GPT-2; what its network makes is kept"),
    Row("soft_prompt", ("prompt",), (), "not before a classifier, which reads its first token"),
)  #: every `delta_type` of OpenDelta 0.3.2


def reason(kind: object) -> str:
    """Why a kind is not read."""
    if isinstance(kind, str) and kind in ABSENT:
        return f"peft_type {kind} is not read: {ABSENT[kind]}. Load it with PEFT."
    close = nearest(kind, DIALECTS) if isinstance(kind, str) else ()
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{str(kind)[:80]!r} is no peft_type of PEFT 0.21.{hint}"
