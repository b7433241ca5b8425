"""Deltas in a folder, or behind any URL that fsspec opens.

    deltas/<digest>/delta.json, delta.safetensors    written once, by content; the JSON last
    names/<name>/@<tag>.json                         an `Entry`, which says what the tag means

There is no index that processes could fight over: a search reads the entries. A file is written
beside its place and moved there, so that it is there as a whole or not at all; what a killed
process leaves is a file with `.part-` in its name, or a delta that no tag names. `tidy` takes both.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from deltatune.core.artefact import FILES
from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.hub.entry import Entry, described, read_entry
from deltatune.hub.reference import Reference
from deltatune.hub.shelf import LARGEST, check_size, files_of, is_part, refuse_beside

__all__ = ["FileShelf"]

_PART = ".part-"


class FileShelf:
    """See `Shelf`.

    Args:
        url: a folder, or what fsspec takes.

    Raises ConfigurationError if fsspec has nothing that opens the URL.
    """

    def __init__(self, url: str) -> None:
        try:
            self.files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"The hub {url} cannot be opened: {error}.") from None
        self.url, self.root = url, root.rstrip("/")

    def references(self) -> list[Reference]:
        """See `Shelf`."""
        with self._explained("read"):
            self.files.invalidate_cache()
            paths = self.files.find(f"{self.root}/names")
        found = []
        for path in paths:
            name, at, file = path.rpartition("/@")
            if at and file.endswith(".json") and _PART not in file:
                name = name.rpartition(f"{self.root}/names/")[2]
                with suppress(ConfigurationError):  # a file that no push has written
                    found.append(Reference(name, file.removesuffix(".json")))
        return sorted(found, key=str)

    def entry(self, reference: Reference) -> Entry | None:
        """See `Shelf`."""
        if reference.digest is None:
            held = self._read(self._tag(reference))
            return None if held is None else read_entry(held, str(reference))
        held = self._read(f"{self.delta(reference.digest)}/{FILES[0]}")
        return None if held is None else described(reference.digest, held, self.url)

    def put(self, folder: Path, entry: Entry, reference: Reference, beside: Path | None) -> None:
        """See `Shelf`. What is there already is sent again: it may have gone bad."""
        refuse_beside(beside)
        place = self.delta(entry.digest)
        with self._explained("written"):
            for path in files_of(folder):
                self._move_in(path, f"{place}/{path.name}")
            self._move_in(entry.model_dump_json().encode(), self._tag(reference))

    def fetch(self, entry: Entry, reference: Reference, to: Path) -> None:
        """See `Shelf`."""
        said = self.entry(Reference(reference.name, None, entry.digest))
        if said is not None and said != entry:
            raise ArtefactError(f"{self.url}: {entry.digest} is not what its tag says of it.")
        place = self.delta(entry.digest)
        with self._explained("read"):
            self.files.invalidate_cache(place)
            found = self.files.ls(place, detail=True) if said is not None else []
        for one in found:
            _check_file(one)
        sizes = {one["name"].rpartition("/")[2]: int(one["size"]) for one in found}
        if not sizes.keys() >= set(FILES):
            raise ArtefactError(
                f"{self.url}: {entry.digest} is named, and is not there. Push it again."
            )
        parts = {name: size for name, size in sizes.items() if is_part(name)}
        for name, size in parts.items():
            check_size(self.url, name, size, entry)
        with self._explained("read"):
            for name in parts:
                self.files.get_file(f"{place}/{name}", str(to / name))

    def remove(self, reference: Reference) -> None:
        """See `Shelf`."""
        with self._explained("written"):
            self.files.rm_file(self._tag(reference))

    def tidy(self, older: float) -> int:
        """See `Shelf`. Deltas that are being pushed are named at the end: what is younger stays."""
        held = [self.entry(reference) for reference in self.references()]
        named = {entry.digest for entry in held if entry is not None}
        with self._explained("written"):
            paths = self.files.find(self.root)
            gone = [path for path in paths if _PART in path and self._age(path) > older]
            deltas: dict[str, list[str]] = {}
            for path in paths:
                folder = _above(path)
                if folder == self.delta(folder.rpartition("/")[2]) and _PART not in path:
                    deltas.setdefault(folder, []).append(path)
            for folder, files in deltas.items():
                if folder.rpartition("/")[2] not in named and min(map(self._age, files)) > older:
                    # The JSON first: what has one is whole.
                    gone += sorted(files, key=lambda path: not path.endswith(FILES[0]))
            for path in gone:
                with suppress(FileNotFoundError):  # another process tidies, too
                    self.files.rm_file(path)
        return len(gone)

    def delta(self, digest: str) -> str:
        """The folder of a delta."""
        return f"{self.root}/deltas/{digest}"

    def _tag(self, reference: Reference) -> str:
        return f"{self.root}/names/{reference.name}/@{reference.tag}.json"

    def _read(self, path: str) -> bytes | None:
        """The content of a description; None where there is none."""
        size = self._size(path)
        if size is None:
            return None
        if size > LARGEST[FILES[0]]:
            raise ArtefactError(f"{path} has {size:,} bytes, more than a description can have.")
        with self._explained("read"):
            try:
                held: bytes = self.files.cat_file(path)
            except FileNotFoundError:
                return None
        return held

    def _size(self, path: str) -> int | None:
        with self._explained("read"):
            try:
                self.files.invalidate_cache(_above(path))
                found = self.files.info(path)
            except FileNotFoundError:
                return None
        _check_file(found)
        return int(found["size"])

    def _age(self, path: str) -> float:
        """Seconds since a file was changed; 0 where its system does not tell."""
        try:
            return float(time.time() - self.files.modified(path).timestamp())
        except (NotImplementedError, FileNotFoundError):
            return 0.0

    def _move_in(self, content: bytes | Path, target: str) -> None:
        """Writes a file beside its place, and moves it there."""
        part = f"{target}{_PART}{uuid.uuid4().hex}"
        self.files.makedirs(_above(target), exist_ok=True)
        if isinstance(content, Path):
            self.files.put_file(str(content), part)
        else:
            self.files.pipe_file(part, content)
        self.files.mv(part, target)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, NotImplementedError) as error:  # some systems can only be read
            raise ArtefactError(f"The hub {self.url} cannot be {what}: {error}.") from error


def _check_file(found: Mapping[str, Any]) -> None:
    """Raises ArtefactError for a pipe, which would never end, and anything else that is no file."""
    if found["type"] != "file":
        raise ArtefactError(f"{found['name']} is no file, but a {found['type']}.")


def _above(path: str) -> str:
    """The folder of a path."""
    return path.rpartition("/")[0]
