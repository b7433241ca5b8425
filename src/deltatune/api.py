"""The verbs: the one place where packages meet. Each is a thin call of what lies below."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from torch import nn

from deltatune.core import artefact, delta
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.grammar import Expression
from deltatune.core.method import Method
from deltatune.core.plan import Plan
from deltatune.core.plan import plan as plan_expression

__all__ = ["attach", "load", "plan", "route", "save"]

Methods: TypeAlias = str | Method | Expression


def attach(
    model: nn.Module,
    method: Methods | Sequence[Methods],
    at: str | None = None,
    *,
    slots: int = 1,
    seed: int | Sequence[int] = 0,
) -> Delta:
    """Binds a method, or a sum of methods, to a model; the model is frozen and the delta acts.

    Args:
        model: a Hugging Face or plain PyTorch model.
        method: a value, `LoRA(rank=8) + Adapter()`, or a text, `"lora(rank=8) + adapter"`; a list
            gives each slot of the delta its own.
        at: the target of every method that names none itself.
        slots: how many deltas of the method to hold beside each other.
        seed: initial values and dropout depend on it alone.

    Raises:
        ConfigurationError, TargetError, UnsupportedError, StateError: see `core.delta.attach`.
    """
    if isinstance(method, str | Method | Expression):
        return delta.attach(model, Expression.of(method).at(at), slots=slots, seed=seed)
    if slots != 1:
        raise ConfigurationError("Give either `slots` or a list with a method for each slot.")
    return delta.attach(model, [Expression.of(one).at(at) for one in method], seed=seed)


def plan(backbone: str | nn.Module, method: Methods, at: str | None = None) -> Plan:
    """What attaching would do: sites, shapes, counts, memory. Changes nothing and reads no weights.

    Args:
        backbone: a model, or what names one: embedded, hub id, folder, config.json.
        method: see `attach`.
        at: see `attach`.
    """
    if isinstance(backbone, str):
        from deltatune.backbones.load import load_architecture

        backbone = load_architecture(backbone)
    return plan_expression(backbone, Expression.of(method).at(at))


def save(trained: Delta, folder: str | Path, *, slot: int = 0, overwrite: bool = False) -> Path:
    """Writes one slot of a delta as `delta.json` and `delta.safetensors`. Raises ArtefactError."""
    return artefact.save(trained, folder, slot=slot, overwrite=overwrite)


def load(folder: str | Path, model: nn.Module) -> Delta:
    """Attaches the delta in a folder. Raises BackboneMismatchError on another backbone,
    ArtefactError.
    """
    return artefact.load(model, folder)


def route(
    model: nn.Module, rows: Sequence[str | tuple[str, int] | Delta | tuple[Delta, int] | None]
) -> ExitStack:
    """Sends each row of the batches within it through its own delta.

    Args:
        model: with any number of deltas attached, of any methods.
        rows: for each row a delta or its name, with a slot where it has several; None for the
            backbone alone.

    Example:
        `with dt.route(model, [mine, (bank, 3), None]): model(**batch)`
    """
    attached = deltas_of(model)
    wanted: list[tuple[Delta, int] | None] = []
    for row in rows:
        which, slot = row if isinstance(row, tuple) else (row, 0)
        if isinstance(which, str):
            named = [one for one in attached if one.name == which]
            if not named:
                raise UnknownNameError("attached delta", which, [one.name for one in attached])
            which = named[0]
        wanted.append(None if which is None else (which, slot))
    stack = ExitStack()
    for one in attached:
        slots = [row[1] if row is not None and row[0] is one else None for row in wanted]
        stack.enter_context(one.route(slots))
    return stack
