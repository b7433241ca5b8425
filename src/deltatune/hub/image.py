"""Deltas in an OCI image layout on disk, the form that tools of registries read.

    oci-layout, index.json          the layout's version; a descriptor for each tag
    blobs/sha256/<digest>           manifests, entries and files of deltas, by content

A delta is a manifest of the artifact type below: its config is the `Entry`, its layers are the
files, each with its name as title (OCI image specification 1.1). A blob is written beside its place
and moved there; a push has the index to itself by a lock, and replaces it as a whole. A delta whose
tag has gone to another stays in the index without a name until `tidy`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltatune.core.artefact import FILES
from deltatune.core.errors import ArtefactError, ConfigurationError, DeltatuneError
from deltatune.core.untrusted import content_of, json_of, size_of
from deltatune.hub.entry import Entry, read_entry
from deltatune.hub.reference import Reference
from deltatune.hub.shelf import check_size, files_of, is_part, refuse_beside

__all__ = ["ImageShelf"]

_NAME, _TITLE = "org.opencontainers.image.ref.name", "org.opencontainers.image.title"
_OURS = "application/vnd.deltatune.delta.v1"
_ENTRY = "application/vnd.deltatune.entry.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_TYPES = {".json": "application/json", ".md": "text/markdown"}
_LARGEST = 4 << 20  # bytes of a manifest; registries take no larger ones
_WAIT = 600.0  # seconds for the lock, which is held for as long as it takes to copy a delta

T = TypeVar("T", bound=BaseModel)


class _Descriptor(BaseModel):
    """Names a blob. What other tools add is kept."""

    model_config = ConfigDict(extra="allow")

    mediaType: str
    digest: Annotated[str, Field(pattern=r"^[a-z0-9+._-]+:[A-Za-z0-9=_-]+$")]
    size: Annotated[int, Field(ge=0)]
    artifactType: str | None = None
    annotations: dict[str, str] = {}


class _Index(BaseModel):
    model_config = ConfigDict(extra="allow")

    schemaVersion: Literal[2] = 2
    mediaType: str = _INDEX
    manifests: list[_Descriptor] = []


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="allow")

    schemaVersion: Literal[2] = 2
    mediaType: str = _MANIFEST
    artifactType: str | None = None
    config: _Descriptor
    layers: list[_Descriptor]


class ImageShelf:
    """See `Shelf`.

    Args:
        folder: of the layout; made by the first push.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def references(self) -> list[Reference]:
        """See `Shelf`."""
        found = []
        for one in self._index().manifests:
            with suppress(ConfigurationError):  # names of other tools
                if one.artifactType == _OURS and _NAME in one.annotations:
                    found.append(Reference.parse(one.annotations[_NAME]))
        return sorted(found, key=str)

    def entry(self, reference: Reference) -> Entry | None:
        """See `Shelf`."""
        found = self._find(reference)
        return None if found is None else found[1]

    def put(self, folder: Path, entry: Entry, reference: Reference, beside: Path | None) -> None:
        """See `Shelf`. What is there already is written again: it may have gone bad."""
        refuse_beside(beside)
        with self._explained("written"), self._changing() as index:
            layers = [
                self._add(path, _TYPES.get(path.suffix, "application/octet-stream"), path.name)
                for path in files_of(folder)
            ]
            config = self._add(entry.model_dump_json().encode(), _ENTRY)
            manifest = _Manifest(artifactType=_OURS, config=config, layers=layers)
            made = self._add(_json(manifest), _MANIFEST)
            made.artifactType, made.annotations = _OURS, {_NAME: str(reference)}
            _unname(index, reference)
            others = (one for one in index.manifests if _named(one) or one.digest != made.digest)
            index.manifests = [*others, made]

    def fetch(self, entry: Entry, reference: Reference, to: Path) -> None:
        """See `Shelf`."""
        found = self._find(reference)
        layers = [] if found is None else found[0].layers
        parts = {one.annotations.get(_TITLE, ""): one for one in layers}
        if not parts.keys() >= set(FILES):
            raise ArtefactError(f"{self.folder}: {reference} has gone. Push it again.")
        for name, layer in parts.items():
            if is_part(name):  # a title is any text
                check_size(str(self.folder), name, layer.size, entry)
                self._copy(layer, to / name)

    def remove(self, reference: Reference) -> None:
        """See `Shelf`."""
        with self._explained("written"), self._changing() as index:
            _unname(index, reference)

    def tidy(self, older: float) -> int:
        """See `Shelf`. Deltas of other tools and all that their manifests name stay."""
        blobs, gone = self.folder / "blobs" / "sha256", 0
        with self._explained("written"), self._changing() as index:
            index.manifests = [one for one in index.manifests if not self._is_left(one, older)]
            if any(one.artifactType != _OURS for one in index.manifests):
                return 0  # what an index within the index needs is not known here
            kept = {one.digest for one in index.manifests}
            for one in index.manifests:
                manifest = self._load(one, _Manifest)
                kept |= {manifest.config.digest, *(layer.digest for layer in manifest.layers)}
            for path in sorted(blobs.iterdir()):
                if f"sha256:{path.name}" not in kept and _age(path) > older:
                    path.unlink()
                    gone += 1
        return gone

    def _is_left(self, one: _Descriptor, older: float) -> bool:
        """Whether a delta is ours, has no name any more, and has had none for long."""
        nameless = one.artifactType == _OURS and not _named(one)
        return nameless and _age(self._blob(one)) > older

    def _find(self, reference: Reference) -> tuple[_Manifest, Entry] | None:
        """The manifest and the entry that a tag names, or that have a digest."""
        for one in self._index().manifests:
            by_tag = one.annotations.get(_NAME) == str(reference)
            if one.artifactType == _OURS and (by_tag or reference.digest is not None):
                manifest = self._load(one, _Manifest)
                entry = read_entry(self._content(manifest.config), str(reference))
                if by_tag or entry.digest == reference.digest:
                    return manifest, entry
        return None

    def _index(self) -> _Index:
        path = self.folder / "index.json"
        with self._explained("read"):
            if not path.exists():
                return _Index()
            return _parsed(content_of(path), _Index, str(path))

    @contextmanager
    def _changing(self) -> Iterator[_Index]:
        """The index, of which one process at a time makes another."""
        blobs = self.folder / "blobs" / "sha256"
        for place in (blobs.parent, blobs):
            if place.is_symlink():  # what is written there, and removed, would be elsewhere
                raise ArtefactError(f"{place} is a link. Put a folder in its place.")
        blobs.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=_WAIT):
            self._write(self.folder / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            index = self._index()
            yield index
            self._write(self.folder / "index.json", _json(index))

    def _add(self, content: bytes | Path, kind: str, title: str | None = None) -> _Descriptor:
        """Keeps a blob; returns what names it."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            size = content.stat().st_size
        else:
            found, size = hashlib.sha256(content).hexdigest(), len(content)
        made = _Descriptor(mediaType=kind, digest=f"sha256:{found}", size=size)
        self._write(self._blob(made), content)
        if title is not None:
            made.annotations = {_TITLE: title}
        return made

    def _write(self, target: Path, content: bytes | Path) -> None:
        """Writes a file beside its place, and moves it there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        try:
            with open(descriptor, "wb") as file:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.write(content)
            os.chmod(part, 0o644)
            os.replace(part, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)

    def _blob(self, one: _Descriptor) -> Path:
        """Raises ArtefactError for a digest of another kind."""
        kind, _, digest = one.digest.partition(":")
        if kind != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ArtefactError(f"{self.folder}: {one.digest!r} is no digest of SHA-256.")
        return self.folder / "blobs" / "sha256" / digest

    def _load(self, one: _Descriptor, kind: type[T]) -> T:
        return _parsed(self._content(one), kind, f"{self.folder}: {one.digest}")

    def _content(self, one: _Descriptor) -> bytes:
        """A small blob, held to its digest. Raises ArtefactError."""
        path = self._blob(one)
        with self._explained("read"):
            size = size_of(path)
            if size != one.size:
                raise ArtefactError(f"{path} has {size:,} bytes, not {one.size:,}. Push it again.")
            content = content_of(path, _LARGEST)
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != one.digest:
            raise ArtefactError(f"{path} does not have the digest that it is named by.")
        return content

    def _copy(self, one: _Descriptor, to: Path) -> None:
        """Copies a blob of the size that its layer names; what reads the delta verifies it."""
        path = self._blob(one)
        with self._explained("read"):
            size = size_of(path)
            if size != one.size:
                raise ArtefactError(f"{path} has {size:,} bytes, not {one.size:,}. Push it again.")
            shutil.copyfile(path, to)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a lock that cannot be had is one, too
            if isinstance(error, DeltatuneError):
                raise
            raise ArtefactError(f"The hub {self.folder} cannot be {what}: {error}.") from error


def _named(one: _Descriptor) -> bool:
    return _NAME in one.annotations


def _unname(index: _Index, reference: Reference) -> None:
    """Takes a tag from what has it."""
    for one in index.manifests:
        if one.annotations.get(_NAME) == str(reference):
            del one.annotations[_NAME]


def _age(path: Path) -> float:
    """Seconds since a file was changed."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _json(content: BaseModel) -> bytes:
    """As OCI writes it: what is not there has no key."""
    return content.model_dump_json(exclude_none=True).encode()


def _parsed(content: bytes, kind: type[T], place: str) -> T:
    try:
        return kind.model_validate(json_of(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtefactError(f"{place}: {where}: {first['msg']}.") from None
    except ValueError as error:
        raise ArtefactError(f"{place} cannot be read: {error}.") from None
