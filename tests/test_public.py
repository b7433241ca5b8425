"""The public names are this list: a name that is added or taken away is a decision."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deltatune

PUBLIC = {
    "Cell",
    "Comparison",
    "Delta",
    "DeltatuneError",
    "Epochs",
    "Run",
    "Seconds",
    "Settings",
    "Steps",
    "Tokens",
    "__version__",
    "attach",
    "compare",
    "evaluate",
    "fit",
    "load",
    "load_backbone",
    "parse",
    "plan",
    "route",
    "save",
    "status",
    "swap",
    "train",
    "train_many",
}
HEAVY = {"torch", "transformers", "accelerate", "sklearn", "scipy", "datasets", "numpy", "pydantic"}


def test_the_public_names_are_this_list() -> None:
    assert set(deltatune.__all__) == PUBLIC
    assert len(PUBLIC) <= 25
    assert set(dir(deltatune)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_described(name: str) -> None:
    value = getattr(deltatune, name)
    if name != "__version__":
        assert value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = deltatune.atach


@pytest.mark.parametrize("module", ["deltatune", "deltatune.cli", "deltatune.core.errors"])
def test_nothing_heavy_is_imported_at_start(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.split())
