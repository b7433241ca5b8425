from __future__ import annotations

import ast
import collections
import gc
from pathlib import Path

import pytest

from deltatune.core.errors import DataError
from deltatune.tasks import Splits, find_task
from deltatune.tasks.embedded import docstrings as sources
from deltatune.tasks.embedded.docstring_tasks import DOCSTRING_BUILDERS
from deltatune.tasks.embedded.near_duplicates import RESEMBLANCE, resemblance, shingles

NAMES = sorted(DOCSTRING_BUILDERS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Splits]:
    """The three tasks, from a fifth of the usual sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sources, "_BYTES_PER_PACKAGE", 1_200_000)
        sources.docstrings.cache_clear()
        try:
            return {name: find_task(name).load() for name in NAMES}
        finally:
            sources.docstrings.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_notes(loaded: dict[str, Splits], name: str) -> None:
    splits = loaded[name]
    assert len(splits.train) > 5 * len(splits.test) > 100
    assert len(splits.validation) > 20
    assert any("Made from Python 3" in note and "torch 2" in note for note in splits.notes)
    assert not any(splits.removed.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicate_straddles(loaded: dict[str, Splits], name: str) -> None:
    splits = loaded[name]
    early = [shingles(" ".join(e.texts) or e.source) for e in splits.train[:400]]
    late = [shingles(" ".join(e.texts) or e.source) for e in splits.test[:40]]
    # Masking can bring two texts a little nearer than they were when they were compared.
    worst = max(resemblance(one, other) for one in early for other in late)
    assert worst < (0.6 if name == "docstring_package" else RESEMBLANCE)


def test_packages_are_balanced_and_their_names_masked(loaded: dict[str, Splits]) -> None:
    splits = loaded["docstring_package"]
    for part in (splits.train, splits.validation, splits.test):
        counts = collections.Counter(example.label for example in part)
        assert len(counts) == 5 and len(set(counts.values())) == 1
    shown = " ".join(example.source.lower() for example in splits.train).split()
    assert not {"torch", "pytorch", "numpy", "transformers", "huggingface"} & set(shown)


def test_matches_are_balanced_and_each_half_is_used_once(loaded: dict[str, Splits]) -> None:
    splits = loaded["docstring_match"]
    for part in (splits.train, splits.validation, splits.test):
        share = sum(int(example.label or 0) for example in part) / len(part)
        assert 0.45 < share < 0.6
    bodies = [example.texts[1] for example in splits.train]
    assert len(set(bodies)) == len(bodies)


def test_names_are_words(loaded: dict[str, Splits]) -> None:
    for example in loaded["docstring_name"].train:
        (name,) = example.targets
        assert name.replace(" ", "").isalnum() and name == name.lower()
        assert example.label is None


def _docstrings(source: str) -> list[str]:
    found = (sources._docstring("python", node) for node in sources._definitions(source.encode()))
    return sorted(f"{d.name}|{d.summary}|{d.body}" for d in found if d)


def test_docstrings_of_a_source() -> None:
    source = '''
class Box:
    """A box that holds
    many things.

    Args:
        size: how many.

    >>> Box(3)
    Box(3)
    """

    def get(self):
        """Return the thing that was asked for."""

def short():
    """Too short."""
'''
    assert _docstrings(source) == [
        "Box|A box that holds many things.|Args: size: how many. Box(3)",
        "get|Return the thing that was asked for.|",
    ]


def test_sources_that_do_not_parse_are_passed_over() -> None:
    assert _docstrings("def {{ name }}(): pass") == []


def test_the_collector_is_left_as_it_was() -> None:
    gc.disable()
    try:
        with sources._without_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with sources._without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not installed"):
        sources._root("no_such_library")
    monkeypatch.setattr(sources, "_root", lambda package: tmp_path)
    sources.docstrings.cache_clear()
    with pytest.raises(DataError, match="No docstring was found"):
        sources.docstrings()


def test_nothing_is_imported_to_be_read() -> None:
    tree = ast.parse(Path(sources.__file__).read_text("utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub"}
