"""Which modules a configuration of OpenDelta names: by the ends of names, or by common names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from deltatune.core.errors import ArtefactError
from deltatune.interop.configuration import Configuration
from deltatune.interop.places import ends

__all__ = ["named_modules"]

_BERT: Mapping[str, str] = {
    "attn@": r"encoder\.layer\.\d+\.attention",
    "attn@.q@": r"encoder\.layer\.\d+\.attention\.self\.query",
    "attn@.k@": r"encoder\.layer\.\d+\.attention\.self\.key",
    "attn@.v@": r"encoder\.layer\.\d+\.attention\.self\.value",
    "attn@.proj@": r"encoder\.layer\.\d+\.attention\.output\.dense",
    "ff@": r"encoder\.layer\.\d+\.(intermediate|output)",
    "ff@.w1@": r"encoder\.layer\.\d+\.intermediate\.dense",
    "ff@.w2@": r"encoder\.layer\.\d+\.output\.dense",
    "layer_norm@": r"encoder\.layer\.\d+\.(attention\.)?output\.LayerNorm",
    "lm_head@.proj@": "",
}
_GPT2: Mapping[str, str] = {
    "attn@": r"h\.\d+\.attn",
    "attn@.q@": "",  # one map makes queries, keys and values, and none of the three names is its
    "attn@.k@": "",
    "attn@.v@": "",
    "attn@.proj@": r"h\.\d+\.attn\.c_proj",
    "ff@": r"h\.\d+\.mlp",
    "ff@.w1@": r"h\.\d+\.mlp\.c_fc",
    "ff@.w2@": r"h\.\d+\.mlp\.c_proj",
    "layer_norm@": r"h\.\d+\.ln_[12]|ln_f",
    "lm_head@.proj@": "",
}
_LAST = r"(encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)"
_T5: Mapping[str, str] = {
    "attn@": r"(en|de)coder\.block\.\d+\.layer\.0",
    "attn@.q@": r"(en|de)coder\.block\.\d+\.layer\.0\.SelfAttention\.q",
    "attn@.k@": r"(en|de)coder\.block\.\d+\.layer\.0\.SelfAttention\.k",
    "attn@.v@": r"(en|de)coder\.block\.\d+\.layer\.0\.SelfAttention\.v",
    "attn@.proj@": r"(en|de)coder\.block\.\d+\.layer\.0\.SelfAttention\.o",
    "ff@": _LAST,
    "ff@.w1@": rf"{_LAST}\.DenseReluDense\.wi",
    "ff@.w2@": rf"{_LAST}\.DenseReluDense\.wo",
    "layer_norm@": r"(en|de)coder\.(block\.\d+\.layer\.\d\.layer_norm|final_layer_norm)",
    "lm_head@.proj@": "",
}
_COMMON: Mapping[str, Mapping[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "gpt2": _GPT2,
    "t5": _T5,
}  # of each family: common names to what they mean behind the base model


def named_modules(
    configuration: Configuration, key: str, terms: Sequence[str], model: nn.Module
) -> list[str]:
    """The modules that some terms of a key name, in the order of the model.

    Raises ArtefactError for a term that deltatune does not know.
    """
    excluded = tuple(configuration.texts("exclude_modules"))
    if configuration.values["common_structure"] is None:
        common = False
    else:
        common = configuration.flag("common_structure")
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    root = _root(model)
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = name.removeprefix(root) if name.startswith(root) else None
        if not name or (excluded and name.startswith(excluded)):
            continue
        for term in terms:
            if common and "@" in term:
                pattern = _pattern(configuration, key, term, kind)
                hit = bool(inside and pattern and re.fullmatch(pattern, inside))
            else:
                hit = ends(name, [_plain(configuration, key, term)]) and not (common and inside)
            if hit:
                found.append(name)
                break
    return found


def _root(model: nn.Module) -> str:
    base = str(getattr(model, "base_model_prefix", ""))
    return f"{base}." if base and hasattr(model, base) else ""


def _pattern(configuration: Configuration, key: str, term: str, kind: str) -> str:
    if kind not in _COMMON:
        raise ArtefactError(
            f"{configuration.where}: common_structure=True names modules as OpenDelta does for all "
            f"models alike; deltatune knows it for {', '.join(sorted(_COMMON))}, not for {kind!r}."
        )
    if term not in _COMMON[kind]:
        configuration.refuse(key, f"of {', '.join(_COMMON[kind])}")
    return _COMMON[kind][term]


def _plain(configuration: Configuration, key: str, term: str) -> str:
    if term.startswith("[r]"):
        configuration.refuse(key, "names of modules; deltatune runs no regular expression of it")
    return term
