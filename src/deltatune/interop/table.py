"""Which kinds of PEFT's folders are read and written, and why others are not."""

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

__all__ = ["ABSENT", "DIALECTS", "TABLE", "Row", "reason"]

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
        kind: PEFT's `peft_type`.
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


def reason(kind: object) -> str:
    """Why a kind is not read."""
    if isinstance(kind, str) and kind in ABSENT:
        return f"peft_type {kind} is not read: {ABSENT[kind]}. Load it with PEFT."
    close = nearest(kind, DIALECTS) if isinstance(kind, str) else ()
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{str(kind)[:80]!r} is no peft_type of PEFT 0.21.{hint}"
