"""What a hub stands on: where names, descriptions and files of deltas lie.

A shelf finds and moves; that what it hands out is what was asked for is seen to by `Hub`. There are
three: files of any system that fsspec opens, an OCI image layout, and repositories of the Hugging
Face Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deltatune.core.artefact import CARD, FILES
from deltatune.core.errors import ArtefactError, UnsupportedError
from deltatune.core.untrusted import LARGEST_JSON
from deltatune.hub.entry import Entry
from deltatune.hub.reference import Reference
from deltatune.hub.signing import is_signature

__all__ = ["LARGEST", "Shelf", "check_size", "files_of", "is_part", "refuse_beside"]

# Bytes; the description of a delta of a million tensors, a page, a signature. What has no bound
# here is held to the size that the description names.
LARGEST = {FILES[0]: LARGEST_JSON, CARD: 1 << 20}
_SIGNATURE = 256


class Shelf(Protocol):
    """Where deltas lie. All methods raise ArtefactError where the place cannot be read or written,
    and for what lies there in another form.
    """

    def references(self) -> list[Reference]:
        """Every name and tag, sorted."""

    def entry(self, reference: Reference) -> Entry | None:
        """What a tag says that it names, or what has a digest; None where there is none."""

    def put(self, folder: Path, entry: Entry, reference: Reference, beside: Path | None) -> None:
        """Puts the files of an artefact there, and points a tag at them, which comes last."""

    def fetch(self, entry: Entry, reference: Reference, to: Path) -> None:
        """Copies the files of a delta into a folder that exists; no more bytes than it may have."""

    def remove(self, reference: Reference) -> None:
        """Takes a tag away that is there."""

    def tidy(self, older: float) -> int:
        """Removes what no tag names and nobody has changed for so many seconds; how many files."""


def files_of(folder: Path) -> list[Path]:
    """The files of an artefact that a hub keeps, the description last: what has it is whole."""
    others = [path for path in sorted(folder.iterdir()) if path.name == CARD or is_signature(path)]
    return [*others, folder / FILES[1], folder / FILES[0]]


def is_part(name: str) -> bool:
    """Whether a hub keeps a file of this name for a delta."""
    return name in (*FILES, CARD) or is_signature(Path(name))


def check_size(place: str, name: str, size: int, entry: Entry) -> None:
    """Raises ArtefactError if a file is larger than it may be; before a byte of it is copied."""
    if name == FILES[1] and size != entry.size:
        raise ArtefactError(
            f"{place}: the tensors of {entry.digest} have {size:,} bytes, not {entry.size:,}. Push "
            "it again."
        )
    largest = entry.size if name == FILES[1] else LARGEST.get(name, _SIGNATURE)
    if size > largest:
        raise ArtefactError(
            f"{place}: {name} has {size:,} bytes, more than the {largest:,} that it can have."
        )


def refuse_beside(beside: Path | None) -> None:
    """Raises UnsupportedError if there are files for others, where others cannot look for them."""
    if beside is not None:
        raise UnsupportedError(
            f"The files in {beside} would lie where no other library looks. They have a place in a "
            "repository of the Hugging Face Hub (hf://owner); here push the delta alone."
        )
