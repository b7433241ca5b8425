"""What AdapterHub and OpenDelta wrote, and what deltatune makes of it.

The archives are of `scripts/peer_folders.py`, which ran where the peers can be imported.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import deltatune as dt
from deltatune.core.errors import ArtefactError

ARCHIVES = Path(__file__).parent / "peers"
PEERS = ("adapterhub", "opendelta")
CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}
CLOSE = 1e-5
_NORMS = "AdapterHub runs that of the backbone twice"
_EITHER = "reads either as NoReFT"
REFUSALS: Mapping[tuple[str, str, str], str] = {
    ("adapterhub", "bert", "direft"): _EITHER,
    ("adapterhub", "bert", "gated"): "use_gating=True has no counterpart",
    ("adapterhub", "bert", "head_one_layer"): "layers=1 has no counterpart",
    ("adapterhub", "bert", "ln_after"): "ln_after=True has no counterpart",
    ("adapterhub", "bert", "mtl_lora"): "name a task for each row",
    ("adapterhub", "bert", "noreft"): _EITHER,
    ("adapterhub", "bert", "prompt_tuning"): "behind the positions and the norm",
    ("adapterhub", "bert", "compacter++"): _NORMS,
    ("adapterhub", "t5", "compacter++"): "does not save what the modules of a T5 share",
    ("adapterhub", "t5", "prefix_tuning"): "relative positions",
    ("adapterhub", "t5", "vera"): "does not save what the modules of a T5 share",
    ("adapterhub", "gpt2", "loreft"): "edits the first tokens of every call",
    ("adapterhub", "gpt2", "par_bn"): "in front of the norm",
    ("adapterhub", "gpt2", "unipelt"): "use_gating=True has no counterpart",
    ("adapterhub", "llama", "lora"): "another Llama than transformers",
    ("opendelta", "bert", "parallel_adapter"): "without its residual and norm",
    ("opendelta", "bert", "soft_prompt"): "first token of the soft prompt",
    ("opendelta", "t5", "prefix"): "relative positions",
}  #: what is not read, and words of the reason


@dataclass(frozen=True)
class Outcome:
    """What became of a folder.

    Attributes:
        difference: the largest between a logit of the peer's and ours; None where it is refused.
        moved: the largest between one of the peer's and one of the backbone alone.
        name: of the delta.
        reason: why it is refused.
    """

    difference: float | None
    moved: float = 0.0
    name: str = ""
    reason: str = ""


def unpacked(place: Path) -> Path:
    """Unpacks the archives into a folder."""
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(place, filter="data")
    return place


def names(peer: str) -> list[tuple[str, str]]:
    """Family and name of every case of a peer."""
    with tarfile.open(ARCHIVES / f"{peer}.tar.xz") as file:
        parts = [Path(name).parts for name in file.getnames()]
    return sorted({(part[1], part[2]) for part in parts if len(part) > 3})


def backbone(place: Path, family: str) -> Any:
    """The backbone of a family."""
    folder = place / "backbones" / family
    return getattr(transformers, CLASSES[family]).from_pretrained(folder).eval()


def logits(place: Path, peer: str, family: str, model: Any) -> Tensor:
    """What a model gives on the peer's inputs, of the text's own positions, padded ones zero."""
    held = load_file(place / peer / f"{family}.safetensors")
    inputs = {name: value for name, value in held.items() if name.endswith(("_ids", "_mask"))}
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return real(found, inputs, family)


def real(found: Tensor, inputs: Mapping[str, Tensor], family: str) -> Tensor:
    """Logits of a decoder-only family without a prompt's, and zero where the text is padded."""
    if family not in ("gpt2", "llama"):
        return found
    mask = inputs["attention_mask"]
    return found[:, -mask.shape[1] :] * mask[..., None]


def read(place: Path, peer: str, family: str, name: str) -> Outcome:
    """Reads a folder on a fresh backbone, and compares."""
    held = load_file(place / peer / f"{family}.safetensors")
    model = backbone(place, family)
    before = logits(place, peer, family, model)
    try:
        delta = dt.load(place / peer / family / name, model, allow_pickle=True)
    except ArtefactError as error:
        return Outcome(None, reason=str(error).split(".json: ")[-1])
    wanted = real(held[name], held, family)
    difference = (logits(place, peer, family, model) - wanted).abs().max()
    return Outcome(float(difference), float((before - wanted).abs().max()), delta.name)
