"""Documentation that fails the build when it lies.

Every ```python block of README and docs is executed, the blocks of one page in one namespace and
one empty folder. Every ```console block is run too: each line `$ deltatune ...` is called, and what
the block shows below it must be what was printed (`...` stands for anything). Output that is not
checked stands in ```text blocks.
"""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from deltatune.core import errors

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Returns (language, text, line number) of every fenced block of the page."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


def commands(block: str) -> list[tuple[str, str]]:
    """Returns (command, shown output) of a console block."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
    joined = [part.replace("\\\n", " ") for part in parts if part.strip()]
    return [(head.strip(), shown) for head, _, shown in (part.partition("\n") for part in joined)]


def run_command(command: str, capture: pytest.CaptureFixture[str]) -> str:
    from deltatune.cli import main

    words = shlex.split(command, comments=True)
    assert words[0] == "deltatune", f"only deltatune is run in console blocks: {command}"
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    printed = capture.readouterr()
    assert stop.value.code in (0, None) or printed.err, command
    return printed.out + printed.err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    namespace: dict[str, object] = {"__name__": page.stem}
    for language, text, line in blocks(page):
        if language == "python":
            code = compile("\n" * (line - 1) + text, str(page), "exec")
            exec(code, namespace)
        elif language == "console":
            for command, shown in commands(text):
                printed = run_command(command, capsys)
                same = doctest.OutputChecker().check_output(shown, printed, FLAGS)
                assert not shown.strip() or same, f"{page.name}:{line}: {command}\n{printed}"


def headings(page: str) -> set[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return set(re.findall(r"^#+ `?([\w-]+)`?", text, flags=re.MULTILINE))


def test_every_method_has_an_entry() -> None:
    from deltatune.methods import METHODS

    assert set(METHODS) <= headings("methods.md")


def test_every_task_has_an_entry() -> None:
    from deltatune.tasks import TASKS

    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert [name for name in TASKS if f"`{name}`" not in text] == []


def test_every_error_has_an_entry() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    names = [name for name in errors.__all__ if name[0].isupper()]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_command_and_package_has_a_page() -> None:
    from deltatune.cli import hub, study, tasks
    from deltatune.cli.app import COMMANDS

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    groups = {"tasks": tasks, "study": study, "hub": hub}
    inner = [f"{group} {name}" for group, module in groups.items() for name in module.COMMANDS]
    names = [*COMMANDS, *inner]
    assert [name for name in names if f"deltatune {name}" not in text] == []
    packages = [path.parent.name for path in (ROOT / "src" / "deltatune").glob("*/__init__.py")]
    assert [name for name in packages if not (ROOT / "docs" / f"{name}.md").exists()] == []


def test_no_page_links_to_nothing() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
