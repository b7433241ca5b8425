"""The description of an artefact, `delta.json`: what it says, and how it vouches for itself.

Its digest covers all of the text but itself, and the text holds the digest of the tensors.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from deltatune.core.errors import ArtefactError
from deltatune.core.fingerprint import Fingerprint
from deltatune.core.untrusted import json_of

__all__ = ["Artefact", "TensorEntry", "describe", "sealed"]


Count = Annotated[int, Field(ge=0)]


class TensorEntry(BaseModel):
    """One stored tensor.

    Attributes:
        shape, dtype: of the whole tensor.
        entries: how many of its entries are in the file, where the others are zero; None: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[Count, ...]
    dtype: str
    entries: Count | None = None


class Artefact(BaseModel):
    """The content of `delta.json`.

    Attributes:
        format, version: what the file is.
        digest: sha256 of `delta.json` with this digest left empty.
        method: the expression, in the grammar of methods.
        backbone: what it was made for.
        tensors: what `delta.safetensors` holds.
        size, blake3: of `delta.safetensors`.
        facts: what its maker measured and wants to keep beside it (task, labels, scores).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["deltatune"] = "deltatune"
    version: Literal[1] = 1
    digest: str = ""
    method: str
    backbone: Fingerprint
    tensors: dict[str, TensorEntry]
    size: Count
    blake3: str
    facts: dict[str, Any] = {}

    @property
    def numbers(self) -> int:
        """How many it holds, zeros that are not in the file apart."""
        return sum(
            math.prod(one.shape) if one.entries is None else one.entries
            for one in self.tensors.values()
        )


def describe(content: bytes, place: str | Path) -> Artefact:
    """What a `delta.json` says, held to its own digest; nothing is known of the tensors then.

    Args:
        content: of the file.
        place: what errors call it.

    Raises ArtefactError if it is malformed, of another version, or was changed.
    """
    try:
        held, text = json_of(content), content.decode("utf-8")
    except ValueError as error:
        raise ArtefactError(f"{place} cannot be read: {error}. Fetch it again.") from None
    if isinstance(held, dict) and held.get("version", 1) != 1:
        raise ArtefactError(
            f"{place} is written in version {held['version']} of the format; this library reads "
            "version 1. Upgrade deltatune."
        )
    try:
        artefact = Artefact.model_validate(held)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtefactError(f"{place}: {where}: {first['msg']}.") from None
    if _digest(text, artefact.digest) != artefact.digest:
        raise ArtefactError(
            f"{place} was changed after it was written: its digest is another. Fetch it again."
        )
    return artefact


def sealed(content: Artefact) -> tuple[Artefact, str]:
    """The description with the digest of all else in it, and its text, `delta.json`."""
    text = content.model_dump_json(indent=1) + "\n"
    digest = _digest(text, "")
    text = text.replace('"digest": ""', f'"digest": "{digest}"', 1)
    return content.model_copy(update={"digest": digest}), text


def _digest(text: str, held: str) -> str:
    """The digest of a `delta.json` that holds `held` as its digest."""
    blank = text.replace(f'"digest": "{held}"', '"digest": ""', 1)
    return hashlib.sha256(blank.encode()).hexdigest()
