"""A hub: deltas by name in a folder, or behind any URL that fsspec opens.

    deltas/<digest>/delta.json, delta.safetensors    written once, by content; the JSON last
    names/<name>/@<tag>.json                         an `Entry`, which says what the tag means

There is no index that processes could fight over: a search reads the entries. A file is written
beside its place and moved there, so that it is there as a whole or not at all; what a killed
process leaves is a file with `.part-` in its name, or a delta that no tag names. `tidy` takes both.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
from pydantic import ValidationError

from deltatune.core.artefact import FILES, read
from deltatune.core.description import describe
from deltatune.core.errors import ArtefactError, ConfigurationError, UnknownNameError
from deltatune.hub.entry import Entry, entry_of
from deltatune.hub.reference import Reference

__all__ = ["Hub", "local_store"]

_LARGEST_JSON = 64 << 20  # bytes; that of a delta of a million tensors
_PART = ".part-"


def local_store() -> Path:
    """Where pulled deltas are kept: `$DELTATUNE_HOME/deltas`, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DELTATUNE_HOME") or Path(cache) / "deltatune") / "deltas"


class Hub:
    """Deltas that several people and processes share.

    Args:
        url: a folder, or what fsspec takes: "s3://bucket/deltas", "memory://hub".
        store: where pulled deltas are kept; None for `local_store`.

    Raises ConfigurationError if fsspec has nothing that opens the URL.
    """

    def __init__(self, url: str | Path, *, store: str | Path | None = None) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"The hub {url} cannot be opened: {error}.") from None
        self.url, self._root = str(url), root.rstrip("/")
        self._store = local_store() if store is None else Path(store)

    def push(self, folder: str | Path, reference: Reference | str) -> Entry:
        """Puts the artefact in `folder` into the hub, under a name and a tag.

        Tensors that are there already are not sent again, so that an interrupted push goes on. A
        tag that names another delta names this one from now on; the other stays, by its digest.

        Raises:
            ArtefactError: the folder holds no whole artefact, or the hub cannot be written.
            ConfigurationError: the reference is none, or names a digest.
        """
        wanted = _reference(reference)
        if wanted.tag is None:
            raise ConfigurationError(f"A digest is found, not given: push to {wanted.name}:tag.")
        entry = entry_of(read(folder))
        description, tensors = (Path(folder) / name for name in FILES)
        place = self._delta(entry.digest)
        with self._explained("written"):
            if self._size(f"{place}/{tensors.name}") != entry.size:
                self._move_in(tensors, f"{place}/{tensors.name}")
            # Last, and anew: what has it is whole, and young enough for `tidy` to leave it.
            self._move_in(description, f"{place}/{description.name}")
            self._move_in(entry.model_dump_json().encode(), self._tag(wanted))
        return entry

    def pull(self, reference: Reference | str) -> Path:
        """The folder of a delta, for `dt.load`; fetched and verified where it is not here yet.

        Raises:
            UnknownNameError: there is no such delta.
            ArtefactError: what the hub holds is damaged, or is not what its digest says.
        """
        entry = self.show(reference)
        target = self._store / entry.digest
        if target.is_dir():  # it was verified before it got its name
            return target
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self._store) as part:
                self._fetch(entry, Path(part) / "delta").rename(target)
        except OSError as error:
            if not target.is_dir():  # else somebody was faster
                raise ArtefactError(f"Cannot write to {self._store}: {error}.") from error
        return target

    def show(self, reference: Reference | str) -> Entry:
        """What the hub says of a delta. Raises as `pull` does."""
        wanted = _reference(reference)
        by_tag = wanted.digest is None
        path = self._tag(wanted) if by_tag else f"{self._delta(str(wanted.digest))}/{FILES[0]}"
        held = self._read(path)
        if held is None:
            raise UnknownNameError("delta", str(wanted), map(str, self._references()))
        return _entry(held, str(wanted)) if by_tag else self._described(str(wanted.digest), held)

    def entries(self) -> Iterator[tuple[Reference, Entry]]:
        """Every tag with what it names, by name. Raises ArtefactError for a broken one."""
        for reference in self._references():
            held = self._read(self._tag(reference))
            if held is not None:  # it may have gone meanwhile
                yield reference, _entry(held, str(reference))

    def search(
        self, words: str = "", *, category: str | None = None, largest: int | None = None
    ) -> list[tuple[Reference, Entry]]:
        """What fits, by name.

        Args:
            words: each must be part of the name, the task, the method or the backbone; cases do
                not matter.
            category: of one of its methods, after Ding et al.
            largest: the most bytes that it may have.
        """
        found = []
        for reference, entry in self.entries():
            text = f"{reference} {entry.task} {entry.method} {entry.backbone}".casefold()
            fits = all(word in text for word in words.casefold().split())
            fits = fits and (category is None or category in entry.categories)
            if fits and (largest is None or entry.size <= largest):
                found.append((reference, entry))
        return found

    def verify(self, reference: Reference | str) -> Entry:
        """Fetches a delta anew and holds it to its digests. Raises as `pull` does."""
        entry = self.show(reference)
        with tempfile.TemporaryDirectory() as part:
            self._fetch(entry, Path(part) / "delta")
        return entry

    def remove(self, reference: Reference | str) -> None:
        """Takes a tag away; the delta stays until `tidy`. Raises UnknownNameError."""
        wanted = _reference(reference)
        self.show(wanted)
        if wanted.tag is None:
            raise ConfigurationError(f"A tag is removed, not a digest: {wanted.name}:tag.")
        with self._explained("written"):
            self._files.rm_file(self._tag(wanted))

    def tidy(self, *, older: float = 24 * 3600) -> int:
        """Removes what no tag names and what killed processes left; returns how many.

        Args:
            older: seconds since the last change. Deltas that are being pushed are named at the end:
                what is younger stays.
        """
        named = {entry.digest for _, entry in self.entries()}
        with self._explained("written"):
            paths = self._files.find(self._root)
            gone = [path for path in paths if _PART in path and self._age(path) > older]
            deltas: dict[str, list[str]] = {}
            for path in paths:
                folder = _above(path)
                if folder == self._delta(folder.rpartition("/")[2]) and _PART not in path:
                    deltas.setdefault(folder, []).append(path)
            for folder, files in deltas.items():
                if folder.rpartition("/")[2] not in named and min(map(self._age, files)) > older:
                    gone += sorted(files)  # the JSON first: what has one is whole
            for path in gone:
                with suppress(FileNotFoundError):  # another process tidies, too
                    self._files.rm_file(path)
        return len(gone)

    # --- files

    def _delta(self, digest: str) -> str:
        return f"{self._root}/deltas/{digest}"

    def _tag(self, reference: Reference) -> str:
        return f"{self._root}/names/{reference.name}/@{reference.tag}.json"

    def _references(self) -> list[Reference]:
        with self._explained("read"):
            self._files.invalidate_cache()
            paths = self._files.find(f"{self._root}/names")
        found = []
        for path in paths:
            name, at, file = path.rpartition("/@")
            if at and file.endswith(".json") and _PART not in file:
                name = name.rpartition(f"{self._root}/names/")[2]
                with suppress(ConfigurationError):  # a file that no push has written
                    found.append(Reference(name, file.removesuffix(".json")))
        return sorted(found, key=str)

    def _fetch(self, entry: Entry, to: Path) -> Path:
        """Copies a delta and verifies it."""
        place = self._delta(entry.digest)
        held = self._read(f"{place}/{FILES[0]}")
        if held is None:
            raise ArtefactError(
                f"{self.url}: {entry.digest} is named, and is not there. Push it again."
            )
        if self._described(entry.digest, held) != entry:
            raise ArtefactError(f"{self.url}: {entry.digest} is not what its tag says of it.")
        size = self._size(f"{place}/{FILES[1]}")
        if size != entry.size:  # before a byte of it is copied
            raise ArtefactError(
                f"{self.url}: the tensors of {entry.digest} have {size} bytes, not {entry.size}. "
                "Push it again."
            )
        to.mkdir()
        (to / FILES[0]).write_bytes(held)
        with self._explained("read"):
            self._files.get_file(f"{place}/{FILES[1]}", str(to / FILES[1]))
        read(to)
        return to

    def _described(self, digest: str, content: bytes) -> Entry:
        """What a `delta.json` says. Raises ArtefactError if it is that of another delta."""
        artefact = describe(content, f"{self.url}: {digest}")
        if artefact.digest != digest:
            raise ArtefactError(f"{self.url}: {digest} holds another delta, {artefact.digest}.")
        return entry_of(artefact)

    def _read(self, path: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        size = self._size(path)
        if size is None:
            return None
        if size > _LARGEST_JSON:
            raise ArtefactError(f"{path} has {size:,} bytes, more than a description can have.")
        with self._explained("read"):
            try:
                held: bytes = self._files.cat_file(path)
            except FileNotFoundError:
                return None
        return held

    def _size(self, path: str) -> int | None:
        with self._explained("read"):
            try:
                self._files.invalidate_cache(_above(path))
                found = self._files.info(path)
            except FileNotFoundError:
                return None
        if found["type"] != "file":  # a pipe, which would never end
            raise ArtefactError(f"{path} is no file, but a {found['type']}.")
        return int(found["size"])

    def _age(self, path: str) -> float:
        """Seconds since a file was changed; 0 where its system does not tell."""
        try:
            return float(time.time() - self._files.modified(path).timestamp())
        except (NotImplementedError, FileNotFoundError):
            return 0.0

    def _move_in(self, content: bytes | Path, target: str) -> None:
        """Writes a file beside its place, and moves it there."""
        part = f"{target}{_PART}{uuid.uuid4().hex}"
        self._files.makedirs(_above(target), exist_ok=True)
        if isinstance(content, Path):
            self._files.put_file(str(content), part)
        else:
            self._files.pipe_file(part, content)
        self._files.mv(part, target)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, NotImplementedError) as error:  # some systems can only be read
            raise ArtefactError(f"The hub {self.url} cannot be {what}: {error}.") from error


def _reference(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference


def _above(path: str) -> str:
    """The folder of a path."""
    return path.rpartition("/")[0]


def _entry(content: bytes, place: str) -> Entry:
    """Reads an entry. Raises ArtefactError."""
    try:
        return Entry.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(f"The entry of {place} is broken: {first['msg']}.") from None
