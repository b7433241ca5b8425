"""A file stays within a screen or two, a function within one. The exceptions may only shrink."""

from __future__ import annotations

import ast
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "deltatune"
LONGEST_FILE = 300
LONGEST_FUNCTION = 40
LONGER_FILES: dict[str, str] = {}  # path -> why
LONGER_FUNCTIONS: dict[str, str] = {}  # path:function -> why


def load_clones() -> ModuleType:
    loader = SourceFileLoader("clones", str(ROOT / "scripts" / "clones"))
    module = module_from_spec(spec_from_loader("clones", loader))
    loader.exec_module(module)
    return module


clones = load_clones()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = clones.code_lines(source)
    name = str(path.relative_to(SOURCE))
    assert name in LONGER_FILES or len(lines) <= LONGEST_FILE, f"{name}: {len(lines)} code lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Its body: a command's signature is the list of its options, and a page long.
            start, end = node.body[0].lineno, node.end_lineno or 0
            length = sum(start <= line <= end for line in lines)
            spot = f"{name}:{node.name}"
            assert spot in LONGER_FUNCTIONS or length <= LONGEST_FUNCTION, f"{spot}: {length}"


def test_clones_are_counted(tmp_path: Path) -> None:
    shared = "    a = 1\n    b = a\n    c = b\n    d = c  # why\n"
    (tmp_path / "lora.py").write_text(f'"""Doc."""\nimport torch\ndef lora():\n{shared}')
    (tmp_path / "dora.py").write_text(f"import os\ndef dora():\n    '''Other.'''\n{shared}")
    found = clones.cloned_lines(sorted(tmp_path.glob("*.py")))
    assert {path.name: len(lines) for path, lines in found.items()} == {"dora.py": 5, "lora.py": 5}
    (tmp_path / "dora.py").write_text(f"def dora():\n    z = 0\n{shared}")
    assert clones.cloned_lines(sorted(tmp_path.glob("*.py"))) == {}


def test_no_method_repeats_another() -> None:
    assert clones.main([]) == 0
