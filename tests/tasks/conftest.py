"""What the tests of tasks share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from deltatune.tasks.example import Row, Tables
from deltatune.tasks.task import Task


def _root() -> Path:
    named = os.environ.get("DELTATUNE_DATA")
    return Path(named) if named else Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def data() -> Path:
    """The folder of real task data; the test is skipped without it."""
    root = _root()
    if not (root / "MANIFEST.csv").is_file():
        pytest.skip(f"no task data at {root}; set DELTATUNE_DATA")
    return root


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the developer's records."""
    monkeypatch.delenv("DELTATUNE_TASKS", raising=False)


# A busy machine is no failure: nothing here is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


RECORD = {
    "name": "toy",
    "version": 1,
    "title": "TOY",
    "kind": "classification",
    "metric": "ACC",
    "provenance": {"category": "Test", "paper": "none", "licence": "none"},
    "source": {"kind": "hub", "dataset": "nobody/toy"},
    "fields": ["text", "label"],
    "template": "say: {{ text | strip }}",
    "texts": ["{{ text }}"],
    "label": "label",
    "labels": ["bad", "good"],
}


@pytest.fixture
def record() -> dict[str, object]:
    """A record as YAML gives it."""
    return dict(RECORD)


@pytest.fixture
def toy() -> Task:
    """A classification task of two labels."""
    return Task.model_validate(RECORD)


class Maker:
    """Makes rows and tables of the toy task."""

    def rows(self, *texts: str, label: int = 0) -> tuple[Row, ...]:
        return tuple(
            Row({"text": text, "label": label}, f"toy:{i}") for i, text in enumerate(texts)
        )

    def tables(self, **splits: tuple[Row, ...]) -> Tables:
        return Tables(splits, "toy", "local", "0")


@pytest.fixture
def make() -> Maker:
    """A maker of rows and tables."""
    return Maker()
