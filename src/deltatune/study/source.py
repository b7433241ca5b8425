"""The code version: what of the code and of the libraries decides a result.

The commit is not it: a change of the documentation or of a report must not make every result stale.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

__all__ = ["DECIDING", "LIBRARIES", "code_lines", "code_version"]

# What of ours decides a result; what only stores or shows results does not.
DECIDING = (
    "backbones",
    "core",
    "evaluation",
    "execution",
    "methods",
    "primitives",
    "tasks",
    "training",
)
LIBRARIES = (
    "accelerate",
    "datasets",
    "numpy",
    "rouge",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)


def code_lines(source: str, *, imports: bool = True) -> dict[int, str]:
    """Returns line number -> text, indented, of the lines of Python that hold code.

    Args:
        source: a Python file. Blank lines, comments and docstrings are left out.
        imports: whether import statements count.
    """
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            case ast.Import() | ast.ImportFrom() if not imports:
                dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return {
        number: text.rstrip()
        for number, text in enumerate(lines, 1)
        if text.strip() and number not in dropped
    }


def code_version(methods: tuple[str, ...] | None = None) -> str:
    """Returns a digest of the code and the libraries that a result depends on, 16 hex digits.

    Counted are the code lines of the packages in `DECIDING`, the records beside them (YAML, CSV)
    and the versions of `LIBRARIES` that are installed.

    Args:
        methods: names of the methods that a cell uses. A method imports no other (a test holds it),
            so a new method leaves the cells of the others valid. None, or a name that is not that
            of a file, counts them all.
    """
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in _files(root, methods):
        digest.update(f"{path.relative_to(root).as_posix()}\0{_file_digest(path)}\0".encode())
    digest.update(repr(sorted(library_versions().items())).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _file_digest(path: Path) -> str:
    """Returns a digest of what counts in a file; read once, as the code itself is."""
    text = path.read_text(encoding="utf-8")
    kept = "\n".join(code_lines(text).values()) if path.suffix == ".py" else text
    return hashlib.sha256(kept.encode()).hexdigest()


@functools.cache
def library_versions() -> dict[str, str]:
    """Returns the versions of `LIBRARIES`, as far as they are installed, without importing them."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _files(root: Path, methods: tuple[str, ...] | None) -> Iterator[Path]:
    """Yields the files that count, in a fixed order."""
    stems = {path.stem for path in (root / "methods").glob("*.py")}
    used = stems if methods is None or not stems.issuperset(methods) else set(methods)
    for package in DECIDING:
        whole = root / package
        for path in [whole] if whole.is_file() else sorted(whole.rglob("*")):
            is_public_method = package == "methods" and not path.stem.startswith("_")
            if path.suffix in {".py", ".yaml", ".csv"} and (
                not is_public_method or path.stem in used
            ):
                yield path
