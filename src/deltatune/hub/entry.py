"""What a hub says of a delta without its tensors: enough to choose one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltatune.core.description import Artefact, describe
from deltatune.core.errors import ArtefactError, DeltatuneError
from deltatune.core.grammar import parse
from deltatune.core.untrusted import json_of
from deltatune.hub.reference import DIGEST

__all__ = ["Entry", "described", "entry_of", "read_entry"]


class Entry(BaseModel):
    """One delta of a hub.

    Attributes:
        digest: SHA-256 of its `delta.json`, which holds the digest of its tensors.
        method: its expression.
        categories: of its methods, after Ding et al., each once.
        backbone: the class of the model that it was made for, and where that came from.
        architecture: digest of the names and shapes of that model.
        task: that it was trained on; "" if its maker did not say.
        scores: on test rows, by metric.
        numbers: how many it holds.
        size: of its tensors, in bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: Annotated[str, Field(pattern=DIGEST)]
    method: str
    categories: tuple[str, ...]
    backbone: str
    architecture: str
    task: str
    scores: dict[str, float]
    numbers: Annotated[int, Field(ge=0)]
    size: Annotated[int, Field(ge=0)]


def entry_of(artefact: Artefact) -> Entry:
    """What a hub says of an artefact. Facts of another form than ours are left out."""
    facts, made_for = artefact.facts, artefact.backbone
    task = facts.get("task")
    return Entry(
        digest=artefact.digest,
        method=artefact.method,
        categories=_categories(artefact.method),
        backbone=" ".join(filter(None, (made_for.kind, made_for.name))),
        architecture=made_for.architecture,
        task=task if isinstance(task, str) else "",
        scores=_scores(facts),
        numbers=artefact.numbers,
        size=artefact.size,
    )


def read_entry(content: bytes, place: str) -> Entry:
    """Reads an entry from JSON. Raises ArtefactError."""
    try:
        return Entry.model_validate(json_of(content))
    except ValidationError as error:
        said = error.errors()[0]["msg"]
    except ValueError as error:
        said = str(error)
    raise ArtefactError(f"The entry of {place} is broken: {said}.")


def described(digest: str, content: bytes, place: str) -> Entry:
    """What a `delta.json` says. Raises ArtefactError if it is that of another delta."""
    artefact = describe(content, f"{place}: {digest}")
    if artefact.digest != digest:
        raise ArtefactError(f"{place}: {digest} holds another delta, {artefact.digest}.")
    return entry_of(artefact)


def _categories(method: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(m.category for m in parse(method) if m.category != "head"))
    except DeltatuneError:  # a plug-in's that is not here
        return ()


def _scores(facts: Mapping[str, Any]) -> dict[str, float]:
    test = facts.get("test")
    held = test.items() if isinstance(test, dict) else ()
    return {
        name: float(value)
        for name, value in held
        if isinstance(value, int | float) and math.isfinite(value)
    }
