"""Who may import whom: the imports of every file are read and compared with this table."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "deltatune"
ANY = frozenset({"*"})

# package -> (what it may import of ours, what of others); the standard library is free.
TABLE: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "primitives": (
        frozenset(
            {"core.errors", "core.leaf", "core.method", "core.policy", "core.select", "core.site"}
            | {"core.storage", "core.text"}
        ),
        frozenset({"torch"}),
    ),
    "core": (
        frozenset(),
        frozenset({"torch", "safetensors", "pydantic", "xxhash", "blake3", "numpy", "regex"}),
    ),
    "methods": (frozenset({"core", "primitives"}), frozenset({"torch"})),
    "backbones": (frozenset({"core"}), ANY),
    "tasks": (
        frozenset({"core.errors", "core.registry"}),
        frozenset(
            {"pydantic", "yaml", "fsspec", "jinja2", "numpy"}
            | {"huggingface_hub", "datasets", "pyarrow", "sklearn", "scipy", "rouge"}
        ),
    ),
    "training": (
        frozenset({"core"}),
        frozenset(
            {"torch", "accelerate", "transformers", "numpy", "psutil", "pydantic", "rich"}
            | {"safetensors"}
        ),
    ),
    "composition": (
        frozenset({"core", "primitives"}),
        frozenset({"torch", "numpy", "cma", "scipy"}),
    ),
    "laplace": (frozenset({"core"}), frozenset({"torch", "safetensors", "pydantic"})),
    "hub": (
        frozenset({"core", "study.report", "study.section"}),
        frozenset({"cryptography", "filelock", "fsspec", "huggingface_hub", "pydantic"}),
    ),
    "interop": (
        frozenset({"core"}),
        frozenset({"torch", "safetensors", "transformers", "huggingface_hub"}),
    ),
    "evaluation": (frozenset({"core", "tasks", "backbones"}), ANY),
    "study": (
        frozenset({"composition", "core", "tasks", "training", "evaluation"}),
        frozenset({"pydantic", "rich", "jinja2", "markupsafe", "matplotlib", "numpy", "scipy"})
        | frozenset({"duckdb", "optuna", "pyarrow", "ray"}),
    ),
    "execution": (
        frozenset({"backbones", "core", "evaluation", "methods", "study", "tasks", "training"}),
        ANY,
    ),
    "catalogue": (frozenset({"core"}), frozenset()),
    "testing": (ANY, ANY),
    "api": (ANY, ANY),
    "cli": (ANY, ANY),
    "__init__": (ANY, ANY),
    "__main__": (ANY, ANY),
}
# No package below may lean on what joins it, nor on the test suites.
TOP = frozenset({"testing", "api", "cli"})

FILES = sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Returns the full names of all modules that the file imports, wherever in it."""
    names: set[str] = set()
    here = ("deltatune", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *filter(None, [node.module])]
            names.add(".".join(base))
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in {"deltatune", *(f"deltatune.{name}" for name in TABLE)}:
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
    return names


def faults(path: Path) -> list[str]:
    package = package_of(path)
    ours, others = TABLE[package]
    found: list[str] = []
    for name in sorted(imported(path)):
        top, _, rest = name.partition(".")
        if top == "deltatune":
            inside = rest.split(".")[0] == package or (not rest)
            allowed = any(rest == own or rest.startswith(f"{own}.") for own in ours)
            upward = rest.split(".")[0] in TOP and package not in TOP | {"__init__", "__main__"}
            if not inside and ((ours is not ANY and not allowed) or upward):
                found.append(f"{package} may not import {name}")
        elif top not in sys.stdlib_module_names and others is not ANY and top not in others:
            found.append(f"{package} may not import {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_table(path: Path) -> None:
    assert package_of(path) in TABLE, f"{package_of(path)} has no row in the import table"
    assert faults(path) == []


def test_a_method_imports_no_other_method() -> None:
    names = {path.stem for path in (SOURCE / "methods").glob("*.py") if path.stem != "__init__"}
    for path in (SOURCE / "methods").glob("*.py"):
        others = {f"deltatune.methods.{name}" for name in names - {path.stem}}
        if path.stem != "__init__":
            assert not imported(path) & others, path.name


def test_the_table_is_enforced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself: lazy, relative and `from package import module` imports are all seen."""
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "tasks").mkdir()
    bad = tmp_path / "tasks" / "bad.py"
    bad.write_text(
        "def late():\n"
        "    import torch\n"
        "    from deltatune.core import chain\n"
        "    from ..api import plan\n"
    )
    assert faults(bad) == [
        "tasks may not import deltatune.api",
        "tasks may not import deltatune.core.chain",
        "tasks may not import torch",
    ]
