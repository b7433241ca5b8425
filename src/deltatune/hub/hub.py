"""A hub: deltas by name, tag and content, verified whenever they are fetched."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deltatune.core.artefact import read
from deltatune.core.errors import ArtefactError, ConfigurationError, UnknownNameError
from deltatune.hub.entry import Entry, entry_of
from deltatune.hub.files import FileShelf
from deltatune.hub.hugging_face import HuggingFaceShelf
from deltatune.hub.image import ImageShelf
from deltatune.hub.reference import Reference
from deltatune.hub.shelf import Shelf
from deltatune.hub.signing import check_signed, signers

__all__ = ["Hub", "local_store"]


def local_store() -> Path:
    """Where pulled deltas are kept: `$DELTATUNE_HOME/deltas`, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DELTATUNE_HOME") or Path(cache) / "deltatune") / "deltas"


class Hub:
    """Deltas that several people and processes share.

    Args:
        url: a folder, what fsspec takes ("s3://bucket/deltas", "memory://hub"), "oci:folder" for an
            OCI image layout, "hf://owner" for the repositories of somebody on the Hugging Face Hub.
        store: where pulled deltas are kept; None for `local_store`.
        trusted: public keys; where there are any, a delta is handed out only if one of them has
            signed it.

    Raises ConfigurationError if nothing opens the URL.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        store: str | Path | None = None,
        trusted: Sequence[str] = (),
    ) -> None:
        self.url, self.trusted = str(url), tuple(trusted)
        self.shelf = _shelf(self.url)
        self._store = local_store() if store is None else Path(store)

    def push(
        self, folder: str | Path, reference: Reference | str, *, beside: str | Path | None = None
    ) -> Entry:
        """Puts the artefact in `folder` into the hub, with its card and signatures, under a name
        and a tag.

        A tag that names another delta names this one from now on; the other stays, by its digest.

        Args:
            folder: of the delta.
            reference: name and tag.
            beside: a folder with what other libraries read of the same delta, as
                `interop.peft.write` makes it; for the Hugging Face Hub.

        Raises:
            ArtefactError: the folder holds no whole artefact, a signature is wrong, or the hub
                cannot be written.
            ConfigurationError: the reference is none, or names a digest.
            UnsupportedError: there is no place for what is beside it.
        """
        wanted = _reference(reference)
        if wanted.tag is None:
            raise ConfigurationError(f"A digest is found, not given: push to {wanted.name}:tag.")
        others = None if beside is None else Path(beside)
        if others is not None and not others.is_dir():
            raise ArtefactError(f"There is no folder {others} to lie beside the delta.")
        entry = entry_of(read(folder))
        signers(folder)
        self.shelf.put(Path(folder), entry, wanted, others)
        return entry

    def pull(self, reference: Reference | str) -> Path:
        """The folder of a delta, for `dt.load`; fetched and verified where it is not here yet.

        Raises:
            UnknownNameError: there is no such delta.
            ArtefactError: what the hub holds is damaged, is not what its digest says, or is signed
                by nobody who is trusted.
        """
        wanted, entry = _reference(reference), self.show(reference)
        target = self._store / entry.digest
        if target.is_dir() and self._is_signed(target):  # it was verified before it got its name
            return target
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self._store) as part:
                found = self._fetch(entry, wanted, Path(part) / "delta")
                if target.is_dir():  # without the signature, which has come since
                    target.rename(Path(part) / "former")
                found.rename(target)
        except OSError as error:
            if not (target.is_dir() and self._is_signed(target)):  # else somebody was faster
                raise ArtefactError(f"Cannot write to {self._store}: {error}.") from error
        return target

    def show(self, reference: Reference | str) -> Entry:
        """What the hub says of a delta. Raises as `pull` does."""
        wanted = _reference(reference)
        found = self.shelf.entry(wanted)
        if found is None:
            raise UnknownNameError("delta", str(wanted), map(str, self.shelf.references()))
        return found

    def entries(self) -> Iterator[tuple[Reference, Entry]]:
        """Every tag with what it names, by name. Raises ArtefactError for a broken one."""
        for reference in self.shelf.references():
            found = self.shelf.entry(reference)
            if found is not None:  # it may have gone meanwhile
                yield reference, found

    def search(
        self,
        words: str = "",
        *,
        category: str | None = None,
        largest: int | None = None,
        least: float | None = None,
    ) -> list[tuple[Reference, Entry]]:
        """What fits, by name.

        Args:
            words: each must be part of the name, the task, the method or the backbone; cases do
                not matter.
            category: of one of its methods, after Ding et al.
            largest: the most bytes that it may have.
            least: what its first score must reach.
        """
        found = []
        for reference, entry in self.entries():
            text = f"{reference} {entry.task} {entry.method} {entry.backbone}".casefold()
            fits = all(word in text for word in words.casefold().split())
            fits = fits and (category is None or category in entry.categories)
            fits = fits and (largest is None or entry.size <= largest)
            if fits and (least is None or next(iter(entry.scores.values()), -1.0) >= least):
                found.append((reference, entry))
        return found

    def verify(self, reference: Reference | str) -> Entry:
        """Fetches a delta anew and holds it to its digests. Raises as `pull` does."""
        wanted, entry = _reference(reference), self.show(reference)
        with tempfile.TemporaryDirectory() as part:
            self._fetch(entry, wanted, Path(part) / "delta")
        return entry

    def remove(self, reference: Reference | str) -> None:
        """Takes a tag away; the delta stays until `tidy`. Raises UnknownNameError."""
        wanted = _reference(reference)
        self.show(wanted)
        if wanted.tag is None:
            raise ConfigurationError(f"A tag is removed, not a digest: {wanted.name}:tag.")
        self.shelf.remove(wanted)

    def tidy(self, *, older: float = 24 * 3600) -> int:
        """Removes what no tag names and what killed processes left; returns how many files.

        Args:
            older: seconds since the last change.
        """
        return self.shelf.tidy(older)

    def _fetch(self, entry: Entry, reference: Reference, to: Path) -> Path:
        """Copies a delta and verifies it."""
        to.mkdir()
        self.shelf.fetch(entry, reference, to)
        found = entry_of(read(to))
        if found.digest != entry.digest:
            raise ArtefactError(f"{self.url}: {entry.digest} holds another delta, {found.digest}.")
        if found != entry:
            raise ArtefactError(f"{self.url}: {entry.digest} is not what its tag says of it.")
        if self.trusted:
            check_signed(to, self.trusted)
        return to

    def _is_signed(self, folder: Path) -> bool:
        try:
            return not self.trusted or bool(check_signed(folder, self.trusted))
        except ArtefactError:
            return False


def _shelf(url: str) -> Shelf:
    if url.startswith("hf://"):
        return HuggingFaceShelf(url.removeprefix("hf://"))
    if url.startswith("oci:"):
        return ImageShelf(Path(url.removeprefix("oci:")))
    return FileShelf(url)


def _reference(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference
