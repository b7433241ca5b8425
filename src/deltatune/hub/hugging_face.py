"""Deltas in repositories of the Hugging Face Hub.

The delta `name` of the hub `hf://owner` is the repository `owner/name`; the tag `latest` is its
branch `main`, any other tag a branch of that name. A push is one commit: there at once or not at
all. Beside the delta lie its card, as README.md with the metadata that the Hub shows, and, where
they are given, the files that PEFT reads. What is fetched goes through the cache of
huggingface_hub, which goes on with what was interrupted.

Token and address are those of huggingface_hub (`hf auth login`, HF_TOKEN, HF_ENDPOINT). A branch
that was removed leaves its commits to the Hub, so that there is nothing to tidy here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCardData,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from deltatune.core.artefact import CARD, FILES, read
from deltatune.core.description import Artefact, describe
from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.core.model_card import model_card
from deltatune.hub.entry import Entry, entry_of
from deltatune.hub.reference import LATEST, Reference
from deltatune.hub.shelf import LARGEST, check_size, files_of, is_part

__all__ = ["HuggingFaceShelf"]

_OWNER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_ELSEWHERE = "The deltas of this repository are in its branches.\n"
_README, _MAIN, _LIBRARY = "README.md", "main", "deltatune"
# Which library for HTTP huggingface_hub stands on differs between its versions.
_HTTP: type[BaseException] = next(
    kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"
)
_MISSING = (RepositoryNotFoundError, RevisionNotFoundError)


class HuggingFaceShelf:
    """See `Shelf`.

    Args:
        owner: whose repositories, a user or an organisation.

    Raises ConfigurationError for what is no name of an owner.
    """

    def __init__(self, owner: str) -> None:
        if _OWNER.fullmatch(owner) is None:
            raise ConfigurationError(
                f"A hub of Hugging Face is named hf://owner; found {'hf://' + owner!r}."
            )
        self.owner, self.url = owner, f"hf://{owner}"
        self._api = HfApi(library_name=_LIBRARY)

    def references(self) -> list[Reference]:
        """See `Shelf`. A branch without a delta is among them."""
        with self._explained("read"):
            models = list(self._api.list_models(author=self.owner, filter=_LIBRARY))
            found = [one for model in models for one in self._branches(model.id)]
        return sorted(found, key=str)

    def entry(self, reference: Reference) -> Entry | None:
        """See `Shelf`."""
        found = self._find(reference)
        return None if found is None else found[0]

    def put(self, folder: Path, entry: Entry, reference: Reference, beside: Path | None) -> None:
        """See `Shelf`. Files of the branch that are not among those of this delta are removed."""
        repository, branch = self._repository(reference), _branch(reference)
        parts = {path.name: path for path in files_of(folder)}
        others = sorted(beside.iterdir()) if beside is not None else []
        parts |= {path.name: path for path in others if path.name != _README}
        added: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in parts.items()]
        card = _readme(read(folder), folder / CARD, as_peft="adapter_config.json" in parts)
        added.append(CommitOperationAdd(_README, card))
        with self._explained("written"):
            self._api.create_repo(repository, exist_ok=True)
            if branch != _MAIN:
                self._begin(repository, branch)
            held = self._api.list_repo_files(repository, revision=branch)
            gone = {name for name in held if not name.startswith(".")} - {*parts, _README}
            self._api.create_commit(
                repository,
                [*added, *(CommitOperationDelete(name) for name in sorted(gone))],
                commit_message=f"{entry.method} by deltatune, {entry.digest[:12]}",
                revision=branch,
            )

    def _begin(self, repository: str, branch: str) -> None:
        """Makes a branch, and has the Hub know what the repository is, which `main` alone tells."""
        self._api.create_branch(repository, branch=branch, exist_ok=True)
        if not self._api.file_exists(repository, _README):
            added = CommitOperationAdd(_README, _page(ModelCardData(**_tags()), _ELSEWHERE))
            self._api.create_commit(repository, [added], commit_message="Deltas are in branches")

    def fetch(self, entry: Entry, reference: Reference, to: Path) -> None:
        """See `Shelf`."""
        found = self._find(reference)
        if found is None:
            raise ArtefactError(f"{self.url}: {reference} has gone. Push it again.")
        repository, commit = self._repository(reference), found[1]
        with self._explained("read"):
            sizes = self._sizes(repository, commit)
            for name, size in sizes.items():
                check_size(self.url, name, size, entry)
            for name in sizes:
                place = self._api.hf_hub_download(repository, name, revision=commit)
                shutil.copyfile(place, to / name)

    def remove(self, reference: Reference) -> None:
        """See `Shelf`. The branch `main` stays, without the delta."""
        repository, branch = self._repository(reference), _branch(reference)
        with self._explained("written"):
            if branch != _MAIN:
                self._api.delete_branch(repository, branch=branch)
                return
            held = self._api.list_repo_files(repository)
            gone = [name for name in held if not name.startswith(".") and name != _README]
            page = _page(ModelCardData(**_tags()), _ELSEWHERE)
            self._api.create_commit(
                repository,
                [CommitOperationAdd(_README, page), *map(CommitOperationDelete, gone)],
                commit_message="Removed by deltatune",
            )

    def tidy(self, older: float) -> int:
        """See `Shelf`: nothing, what no branch names is with the Hub."""
        del older
        return 0

    def _find(self, reference: Reference) -> tuple[Entry, str] | None:
        """What a tag names or has a digest, and its commit; None where there is none."""
        repository = self._repository(reference)
        with self._explained("read"):
            try:
                if reference.digest is None:
                    return self._entry(repository, _branch(reference))
                for branch in self._branches(repository):
                    commits = self._api.list_repo_commits(repository, revision=_branch(branch))
                    for commit in commits:
                        found = self._entry(repository, commit.commit_id)
                        if found is not None and found[0].digest == reference.digest:
                            return found
            except _MISSING:
                pass
        return None

    def _entry(self, repository: str, revision: str) -> tuple[Entry, str] | None:
        """The delta of a revision, and the commit that this is now."""
        commit = self._api.repo_info(repository, revision=revision).sha
        assert commit is not None  # the Hub names one for every revision
        size = self._sizes(repository, commit).get(FILES[0])
        if size is None:
            return None
        if size > LARGEST[FILES[0]]:
            raise ArtefactError(f"{repository}: {FILES[0]} has {size:,} bytes, which it cannot.")
        path = Path(self._api.hf_hub_download(repository, FILES[0], revision=commit))
        return entry_of(describe(path.read_bytes(), f"{repository} at {revision}")), commit

    def _sizes(self, repository: str, commit: str) -> dict[str, int]:
        """The files of a delta with their sizes in bytes."""
        found = self._api.list_repo_tree(repository, revision=commit)
        return {
            one.path: one.size for one in found if isinstance(one, RepoFile) and is_part(one.path)
        }

    def _branches(self, repository: str) -> list[Reference]:
        name = repository.partition("/")[2]
        refs = self._api.list_repo_refs(repository)
        found = []
        for branch in refs.branches:
            try:
                found.append(Reference(name, LATEST if branch.name == _MAIN else branch.name))
            except ConfigurationError:  # what no push has made
                continue
        return found

    def _repository(self, reference: Reference) -> str:
        if "/" in reference.name or reference.tag == _MAIN:
            raise ConfigurationError(
                f"On the Hugging Face Hub a delta is a repository of {self.owner}: a name without "
                f"'/', and another tag than 'main', which is 'latest' here. Found "
                f"{str(reference)!r}."
            )
        return f"{self.owner}/{reference.name}"

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, _HTTP) as error:
            if isinstance(error, ConfigurationError):
                raise
            said = str(error).strip().partition("\n")[0]
            raise ArtefactError(f"The hub {self.url} cannot be {what}: {said}.") from error


def _branch(reference: Reference) -> str:
    return _MAIN if reference.tag == LATEST else str(reference.tag)


def _readme(artefact: Artefact, card: Path, *, as_peft: bool) -> bytes:
    """The card with what the Hub shows and searches."""
    text = card.read_text(encoding="utf-8") if card.is_file() else model_card(artefact)
    licence, name = artefact.facts.get("licence"), artefact.backbone.name
    data = ModelCardData(
        base_model=name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None,
        license=licence if isinstance(licence, str) else None,
        **_tags("peft" if as_peft else None),
    )
    return _page(data, text)


def _tags(library: str | None = None) -> dict[str, Any]:
    """The metadata by which the Hub knows what a repository is for."""
    others = [library] if library else []
    return {"library_name": library or _LIBRARY, "tags": [_LIBRARY, "delta-tuning", *others]}


def _page(data: ModelCardData, text: str) -> bytes:
    return f"---\n{data.to_yaml()}\n---\n\n{text}".encode()
