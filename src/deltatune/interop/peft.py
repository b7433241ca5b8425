"""PEFT's folders, `adapter_config.json` with `adapter_model.safetensors`: read, and written.

What is read computes what PEFT computes, or is refused; so is what is written. PEFT itself is not
needed. A folder of PEFT names its backbone, but holds no fingerprint of it: that the weights are
the same cannot be verified, and `delta.origins` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.core.artefact import stored_tensors
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError, ConfigurationError, DeltatuneError
from deltatune.core.grammar import Expression
from deltatune.core.layout import Part, layout
from deltatune.core.method import MERGED
from deltatune.interop.adopting import adopt
from deltatune.interop.dialects.dialect import Dialect
from deltatune.interop.dialects.lora import LoRA
from deltatune.interop.dialects.modules import LNTuning, is_whole, whole_tensors
from deltatune.interop.folder import (
    CONFIGURATION,
    TENSORS,
    Header,
    read_configuration,
    told,
    write_folder,
)
from deltatune.interop.plan import Plan
from deltatune.interop.table import DIALECTS

__all__ = ["holds", "read", "write"]

_PICKLED = "adapter_model.bin"
_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
_CLASSIFIERS, _UNASKED = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")


def holds(folder: str | Path) -> bool:
    """Whether a folder is one of PEFT's."""
    return (Path(folder) / CONFIGURATION).is_file()


def read(folder: str | Path, model: nn.Module, *, seed: int = 0) -> Delta:
    """Attaches what a folder of PEFT holds to a model.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the backbone that it was made for, as PEFT was given it.
        seed: of dropout, in further training.

    Returns:
        The delta. `delta.origins[0]` holds the configuration; `save` keeps it among the facts.

    Raises:
        ArtefactError: files are missing or malformed; a key or a value of the configuration has no
            counterpart; a tensor is missing, belongs to nothing or has another shape.
    """
    path = Path(folder)
    values = read_configuration(path)
    with told(path):
        plan = Plan.of(values, str(path / CONFIGURATION), model)
        header = _header(path)
        header.check(plan.shapes(), str(plan.expression))
        leaves = plan.leaves(header.read(plan.dialect.whole))
        return adopt(
            model, plan.expression, leaves, library="peft", configuration=values, seed=seed
        )


def _header(folder: Path) -> Header:
    """The header of a folder's tensors. Raises ArtefactError, for a pickle, too."""
    path, pickled = folder / TENSORS, folder / _PICKLED
    if path.exists():
        return Header.of(path)
    if pickled.exists():
        raise ArtefactError(
            f"{folder} has {_PICKLED} alone, a pickle, which runs code when it is read. "
            f"Load it with PEFT, where you trust it, and save it anew as {TENSORS}."
        )
    raise ArtefactError(f"{folder} is no folder of PEFT: {TENSORS} is missing.")


def write(delta: Delta, folder: str | Path, slot: int = 0, *, as_lora: bool = False) -> Path:
    """Writes one slot of a delta as a folder that `PeftModel.from_pretrained` loads.

    Args:
        delta: of methods that `deltatune.interop.table` lists; heads and other modules that are
            trained whole become `modules_to_save`.
        folder: where; it must not exist.
        slot: which.
        as_lora: write what is a product of two factors as LoRA, where PEFT has a kind of its own,
            too.

    Raises:
        ConfigurationError: PEFT cannot express it, with the nearest that it can.
        ArtefactError: the folder exists or cannot be written.
    """
    delta.check_slot(slot)
    model = delta.model
    expression = Expression(tuple(method.stored() for method in delta.expressions[slot]))
    parts = delta.parts if expression == delta.expression else layout(model, expression)
    held = stored_tensors(delta, slot)
    dialect, own, whole = _divided(parts, as_lora)
    origin = delta.origins.get(slot, {}).get("configuration", {})
    tensors = dialect.tensors(own, held, model) | whole_tensors(whole, held)
    saved = [site.path for part in whole for site in part.sites]
    values = {
        "peft_type": dialect.kind,
        "base_model_name_or_path": _name_of(model, origin),
        "inference_mode": True,
        "task_type": _task(model, saved),
        **({"modules_to_save": saved} if saved else {}),
        **dialect.settings(own, held, model, origin),
    }
    _check_written(values, tensors, model)
    write_folder(Path(folder), values, tensors)
    return Path(folder)


def _divided(parts: Sequence[Part], as_lora: bool) -> tuple[Dialect, list[Part], list[Part]]:
    """The dialect of a folder, the parts that it writes, and those that are saved whole."""
    whole = [part for part in parts if is_whole(part)]
    own = [part for part in parts if not is_whole(part)]
    if own:
        return _dialect_of(own, as_lora), own, whole
    heads = [part for part in whole if part.method.name == "head"]
    rest = [part for part in whole if part.method.name != "head"]
    return (LNTuning(), rest, heads) if rest else (LNTuning(), heads, [])


def _dialect_of(parts: Sequence[Part], as_lora: bool) -> Dialect:
    """The dialect that writes all of some parts. Raises ConfigurationError."""
    methods = [part.method for part in parts]
    lora = LoRA()
    if as_lora and all(map(lora.takes, methods)):
        return lora
    for dialect in DIALECTS.values():
        if all(map(dialect.takes, methods)):
            return dialect
    names = " + ".join(dict.fromkeys(str(method) for method in methods))
    folds = all(method.face in MERGED for method in methods)
    raise ConfigurationError(
        f"A folder of PEFT holds one kind, and none is {names}. "
        + (
            "Nearest: a LoRA, as_delta(effective(delta)) of deltatune.composition."
            if folds
            else "There is no nearest: keep it as a delta, dt.save(delta, folder)."
        )
    )


def _name_of(model: nn.Module, origin: Mapping[str, Any]) -> str | None:
    """The name of a backbone, as it says itself or as the folder said that it was read from."""
    return getattr(model, "name_or_path", None) or origin.get("base_model_name_or_path")


def _task(model: nn.Module, saved: Sequence[str]) -> str | None:
    """PEFT's name of what a model does; None where PEFT, which saves the head of a classifier
    unasked, would look for what is not saved.
    """
    kind = type(model).__name__
    task = next((task for end, task in _CLASSES.items() if kind.endswith(end)), None)
    unasked = [name for name, _ in model.named_modules() if name.endswith(_UNASKED)]
    return task if task not in _CLASSIFIERS or set(unasked) <= set(saved) else None


def _check_written(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Raises ConfigurationError unless the folder would be read as what was written.

    PEFT takes names of modules for the ends of names, and keys of patterns for regular expressions.
    """
    meant = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        found = Plan.of(values, "the folder", model).shapes()
    except DeltatuneError as error:
        raise ConfigurationError(f"PEFT would not read what is written: {error}") from None
    if found != meant:
        names = sorted(found.keys() ^ meant.keys() or found)
        raise ConfigurationError(
            f"The names of this model's modules end alike, so that PEFT would take {names[0]} for "
            f"trained, too, or not ({len(names)} such). Keep it as a delta."
        )
