"""Starting from a trained delta: what one slot begins with is what another has learned.

Prompts that begin as those of other tasks (SPoT, Vu et al. 2022; PPT, Gu et al. 2022) are this, and
so is any other method that does not begin from its draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltatune.core.artefact import Artefact, read, read_tensors, refuse, stored_tensors
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError
from deltatune.core.fingerprint import fingerprint
from deltatune.core.grammar import Expression, parse
from deltatune.core.in_place import InPlaceBank
from deltatune.core.leaf import zeros
from deltatune.core.method import METHODS
from deltatune.core.site import originals

__all__ = ["start_from"]

Form = tuple[Expression, dict[str, Tensor]]


def start_from(
    delta: Delta, source: Delta | str | Path, *, slot: int = 0, source_slot: int = 0
) -> None:
    """Copies what a trained delta has learned into one slot, heads aside: a task has its own.

    The slot's methods must include those of the source; what the source does not have stays as it
    was drawn. Dropout may differ. A delta that trains in another form than it is stored in
    (`p_tuning`) starts one of the same form, or one of the stored form (`prompt`).

    Args:
        delta: attached.
        source: a delta, of this model or of another of the same shapes, or an artefact's folder.
        slot: which of its slots.
        source_slot: which slot of a source that is a delta.

    Raises:
        ConfigurationError: there is no such slot, or the methods or their shapes differ.
        ArtefactError: the files of the folder are damaged.
        BackboneMismatchError: the folder's delta was made for another backbone.
        StateError: the slot is merged, or the delta trains in place.
    """
    delta.check_slot(slot)
    if isinstance(delta.bank, InPlaceBank) or delta.merged_slot == slot:
        raise StateError(
            f"Slot {slot} of {delta.name} is merged, or trains the backbone itself. Unmerge it, or "
            "start a delta."
        )
    forms = list(_forms(delta, source, source_slot))
    wanted = _comparable(delta.expressions[slot])
    found = next((form for form in forms if _comparable(form[0]) <= wanted), None)
    held = delta.tensors(slot)
    taken = {} if found is None else _without_heads(found[1])
    if not taken or any(n not in held or held[n].shape != t.shape for n, t in taken.items()):
        names = " or ".join(dict.fromkeys(str(expression) for expression, _ in forms))
        raise ConfigurationError(
            f"Slot {slot} holds {delta.expressions[slot]}, which cannot start from {names}: it "
            "must have the methods of its source, heads aside, at the same sites, with the same "
            "fields and shapes."
        )
    delta.bank.write(slot, held | taken)
    delta.saved.pop(slot, None)


def _forms(delta: Delta, source: Delta | str | Path, slot: int) -> Iterator[Form]:
    """What a source can give: its leaves as they are trained, and as they are stored."""
    if isinstance(source, Delta):
        source.check_slot(slot)
        expression = source.expressions[slot]
        if not isinstance(source.bank, InPlaceBank):
            yield expression, source.tensors(slot)
        yield Expression(tuple(m.stored() for m in expression)), stored_tensors(source, slot)
        return
    artefact = read(source)
    own = fingerprint(
        delta.model, originals=originals(delta.model), excluded=artefact.backbone.excluded
    )
    refuse(source, artefact, own)
    yield parse(artefact.method), _tensors(Path(source), artefact)


def _tensors(folder: Path, artefact: Artefact) -> dict[str, Tensor]:
    leaves = {
        name: replace(zeros(*entry.shape), dtype=getattr(torch, entry.dtype, torch.float32))
        for name, entry in artefact.tensors.items()
    }
    return read_tensors(folder, artefact, leaves)


def _comparable(expression: Expression) -> set[str]:
    """Its methods without heads, and without what does not change what their leaves mean."""
    methods = (method for method in expression if method.category != "head")
    return {str(replace(method, dropout=0.0)) for method in methods}


def _without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def is_head(name: str) -> bool:
        return METHODS[name.partition("/")[0].partition(".")[0]].category == "head"

    return {name: value for name, value in tensors.items() if not is_head(name)}
