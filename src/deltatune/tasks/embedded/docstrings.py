"""The docstrings of the standard library and of our own dependencies, read without importing them.

Sources are parsed by `ast`. All packages here are hard dependencies, so every installation has
them; which docstrings there are depends on their versions, which `versions` names.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltatune.core.errors import DataError
from deltatune.tasks.text import digest

__all__ = ["PACKAGES", "Docstring", "docstrings", "versions"]

PACKAGES: Mapping[str, str] = {
    "python": "",
    "numpy": "numpy",
    "torch": "torch",
    "transformers": "transformers",
    "hub": "huggingface_hub",
}
"""Label to package; the standard library has none."""

_BYTES_PER_PACKAGE = 6_000_000
_SKIPPED = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "testing",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "_vendor",
    ]
)
_SPACES = re.compile(r"\s+")
_MINIMUM_WORDS = 5


@dataclass(frozen=True)
class Docstring:
    """One docstring.

    Attributes:
        package: a label of PACKAGES.
        name: of the class or function.
        is_function: whether it is a function or method.
        summary: its first paragraph, in one line.
        body: the rest without doctests, in one line; may be empty.
    """

    package: str
    name: str
    is_function: bool
    summary: str
    body: str

    @property
    def text(self) -> str:
        """Summary and body."""
        return f"{self.summary} {self.body}".strip()


def versions() -> str:
    """Returns the Python and the libraries that the docstrings come from, with versions."""
    found = [f"Python {platform.python_version()}"]
    found += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES.values() if name]
    return ", ".join(found)


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """Returns the docstrings of about 6 MB of each package's sources, each text once.

    Which files are read depends on a hash of their paths inside the package.

    Raises:
        DataError: a package is not installed with its sources.
    """
    found: dict[str, Docstring] = {}
    with _without_garbage_collection():
        for label, package in PACKAGES.items():
            for docstring in _of_package(label, package):
                found.setdefault(docstring.text.casefold(), docstring)
    return tuple(found.values())


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # Syntax trees have no cycles, and the collector's rounds over them take four fifths of the
    # time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _root(package: str) -> Path:
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    specification = importlib.util.find_spec(package)
    if specification is None or specification.origin is None:
        raise DataError(
            f"The embedded tasks are made from the sources of {package}, which is not installed."
        )
    return Path(specification.origin).parent


def _of_package(label: str, package: str) -> Iterator[Docstring]:
    root = _root(package)
    budget = _BYTES_PER_PACKAGE
    empty = True
    for path in sorted(_sources(root), key=lambda path: digest(path.as_posix())):
        source = (root / path).read_bytes()
        budget -= len(source)
        if budget < 0:
            break
        for node in _definitions(source):
            docstring = _docstring(label, node)
            if docstring is not None:
                empty = False
                yield docstring
    if empty:
        raise DataError(f"No docstring was found under {root}; are the sources installed?")


def _sources(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        yield from (
            (Path(folder) / name).relative_to(root) for name in names if name.endswith(".py")
        )


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(source: bytes) -> Iterator[_Definition]:
    try:
        waiting: list[ast.Module | ast.ClassDef] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        # Templates and files for other versions of Python are no loss.
        return
    while waiting:
        for node in waiting.pop().body:
            if isinstance(node, _Definition):
                yield node
            if isinstance(node, ast.ClassDef):
                waiting.append(node)


def _docstring(label: str, node: _Definition) -> Docstring | None:
    text = ast.get_docstring(node)
    if not text:
        return None
    lines = (line for line in text.splitlines() if not line.lstrip().startswith((">>>", "...")))
    summary, _, body = "\n".join(lines).partition("\n\n")
    summary, body = _one_line(summary), _one_line(body)
    if len(summary.split()) < _MINIMUM_WORDS:
        return None
    return Docstring(label, node.name, not isinstance(node, ast.ClassDef), summary, body)


def _one_line(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
