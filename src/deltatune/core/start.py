"""Starting from a trained delta: what one slot begins with is what another has learned.

Prompts that begin as those of other tasks (SPoT, Vu et al. 2022; PPT, Gu et al. 2022) are this, and
so is any other method that does not begin from its draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.core.artefact import read, read_listed, refuse, stored_tensors
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError
from deltatune.core.grammar import Expression, parse
from deltatune.core.in_place import InPlaceBank
from deltatune.core.method import METHODS, Method
from deltatune.core.mixer import Mixer
from deltatune.core.site import originals

__all__ = ["fill_expert", "start_from"]

Form = tuple[Expression, dict[str, Tensor]]

_BEGINNINGS = ("at", "dropout", "up_std")  # fields that leave the meaning of trained leaves alone


def start_from(
    delta: Delta,
    source: Delta | str | Path,
    *,
    slot: int = 0,
    source_slot: int = 0,
    only_shared: bool = False,
) -> None:
    """Copies what a trained delta has learned into one slot, heads aside: a task has its own.

    The slot's methods must include those of the source; what the source does not have stays as it
    was drawn. Dropout may differ, and which leaves are trained. What the slot shares with others is
    then theirs too. A delta that trains in another form than it is stored in
    (`p_tuning`) starts one of the same form, or one of the stored form (`prompt`).

    Args:
        delta: attached.
        source: a delta, of this model or of another of the same shapes, or an artefact's folder.
        slot: which of its slots.
        source_slot: which slot of a source that is a delta.
        only_shared: whether to copy the `shared_leaves` of its methods alone: what was learned from
            several tasks, without what is of one of them.

    Raises:
        ConfigurationError: there is no such slot, or the methods or their shapes differ.
        ArtefactError: the files of the folder are damaged.
        BackboneMismatchError: the folder's delta was made for another backbone.
        StateError: the slot is merged, or the delta trains in place.
    """
    _check_writable(delta, slot)
    forms = list(_forms(delta, source, source_slot))
    wanted = _comparable(delta.expressions[slot])
    found = next((form for form in forms if _comparable(form[0]) <= wanted), None)
    held = delta.tensors(slot)
    taken = {} if found is None else _without_heads(found[1])
    if only_shared:
        taken = {name: value for name, value in taken.items() if _is_shared(name)}
    if not taken or any(n not in held or held[n].shape != t.shape for n, t in taken.items()):
        names = " or ".join(dict.fromkeys(str(expression) for expression, _ in forms))
        raise ConfigurationError(
            f"Slot {slot} holds {delta.expressions[slot]}, which cannot start from {names}: it "
            "must have the methods of its source, heads aside, at the same sites, with the same "
            "fields and shapes."
        )
    delta.bank.write(slot, held | taken)
    delta.saved.pop(slot, None)


def fill_expert(
    delta: Delta,
    source: Delta | str | Path,
    expert: int,
    *,
    slot: int = 0,
    source_slot: int = 0,
) -> None:
    """Copies a trained delta into one expert of a mixture: an adapter into a fusion of adapters, a
    LoRA into a mixture of LoRAs, any method into the member of a mixer that is the same method.
    What is trained beside the experts stays as it was drawn.

    The source holds one method, a head aside, whose leaves are those of one expert, at the same
    sites; fields that both methods have must agree.

    Args:
        delta: attached; holds a mixture.
        source: see `start_from`.
        expert: which one, counted from 0.
        slot: which of the delta's slots.
        source_slot: which slot of a source that is a delta.

    Raises:
        ConfigurationError: there is no such slot or expert, or the source is none of its kind.
        ArtefactError, BackboneMismatchError, StateError: see `start_from`.
    """
    _check_writable(delta, slot)
    forms = list(_forms(delta, source, source_slot))
    held = delta.tensors(slot)
    member = next((m for form in forms if (m := _as_member(delta, held, form, expert))), None)
    if member is not None:
        delta.bank.write(slot, held | member)
        delta.saved.pop(slot, None)
        return
    found = next((taken for form in forms if (taken := _as_expert(delta, held, form))), None)
    if found is None:
        names = " or ".join(dict.fromkeys(str(expression) for expression, _ in forms))
        raise ConfigurationError(
            f"No method of {delta.expressions[slot]} takes {names} as an expert: it must be one "
            "method whose leaves are those of one expert, at the same sites, and the fields that "
            "both have must agree."
        )
    experts = len(held[next(iter(found))])
    if not 0 <= expert < experts:
        raise ConfigurationError(f"There is no expert {expert}: 0 to {experts - 1} are there.")
    for name, value in found.items():
        held[name] = held[name].clone()
        held[name][expert] = value
    delta.bank.write(slot, held)
    delta.saved.pop(slot, None)


def _check_writable(delta: Delta, slot: int) -> None:
    delta.check_slot(slot)
    if isinstance(delta.bank, InPlaceBank) or delta.merged_slot == slot:
        raise StateError(
            f"Slot {slot} of {delta.name} is merged, or trains the backbone itself. Unmerge it, or "
            "start a delta."
        )


def _as_member(delta: Delta, held: dict[str, Tensor], form: Form, expert: int) -> dict[str, Tensor]:
    """The leaves of a form by the names that they have in one member of a mixer; none if they do
    not fit.
    """
    methods = [method for method in form[0] if method.category != "head"]
    values = {name.partition("/")[2]: value for name, value in _without_heads(form[1]).items()}
    for place, part in enumerate(delta.parts):
        if len(methods) != 1 or not isinstance(part.method, Mixer):
            continue
        if not 0 <= expert < part.method.members:
            continue
        member = delta.parts[place + 1 + expert]
        own = {n for n in held if n.startswith(f"{member.key}/")}
        taken = {f"{member.key}/{name}": value for name, value in values.items()}
        if (
            member.method.name == methods[0].name
            and _agree(member.method, replace(methods[0], strength=member.method.strength))
            and own == taken.keys()
            and all(held[n].shape == value.shape for n, value in taken.items())
        ):
            return taken
    return {}


def _as_expert(delta: Delta, held: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    """The leaves of a form by the names of the stacked leaves that take them; none if they do not
    fit.
    """
    methods = [method for method in form[0] if method.category != "head"]
    values = {name.partition("/")[2]: value for name, value in _without_heads(form[1]).items()}
    leaves = {name.rpartition("/")[2] for name in values}
    for part in delta.parts:
        own = {n: v for n, v in held.items() if n.startswith(f"{part.key}/")}
        own = {name: v for name, v in own.items() if name.rpartition("/")[2] in leaves}
        taken = {f"{part.key}/{name}": value for name, value in values.items()}
        if (
            len(methods) == 1
            and _agree(part.method, methods[0])
            and own.keys() == taken.keys()
            and all(own[n].ndim and own[n].shape[1:] == value.shape for n, value in taken.items())
            and len({len(value) for value in own.values()}) == 1
        ):
            return taken
    return {}


def _agree(one: Method, other: Method) -> bool:
    """Whether fields that both methods have are equal."""
    common = {f.name for f in fields(one)} & {f.name for f in fields(other)}
    return all(getattr(one, name) == getattr(other, name) for name in common - set(_BEGINNINGS))


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
    made_for = artefact.backbone
    own = delta.host.fingerprint(made_for.excluded, originals(delta.model), like=made_for)
    refuse(source, artefact, own)
    yield parse(artefact.method), read_listed(Path(source), artefact)


def _comparable(expression: Expression) -> set[str]:
    """Its methods without heads, and without what does not change what their leaves mean."""
    methods = (method for method in expression if method.category != "head")
    return {str(replace(method, dropout=0.0, **_defaults(method))) for method in methods}


def _defaults(method: Method) -> dict[str, Any]:
    return {f.name: f.default for f in fields(method) if f.name in method.training_fields}


def _is_shared(name: str) -> bool:
    return name.rpartition("/")[2] in _method(name).shared_leaves


def _method(name: str) -> type[Method]:
    """That of a leaf, by its full name."""
    return METHODS[name.partition("/")[0].partition(".")[0]]


def _without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if _method(name).category != "head"}
