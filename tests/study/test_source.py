from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deltatune.study import source
from deltatune.study.source import code_lines, code_version, library_versions


def test_code_lines_leave_out_what_is_not_code() -> None:
    text = '"""Doc.\n\nmore\n"""\nimport os\n\n# a comment\nx = "#no"  # why\n"""of x"""\n'
    assert code_lines(text) == {5: "import os", 8: 'x = "#no"'}
    assert code_lines(text, imports=False) == {8: 'x = "#no"'}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in (*source.DECIDING, "study", "cli"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text("x = 1  # one\n")
    monkeypatch.setattr(source, "__file__", str(tmp_path / "study" / "source.py"))
    yield tmp_path
    library_versions.cache_clear()


def version(methods: tuple[str, ...] | None = None) -> str:
    source._file_digest.cache_clear()
    library_versions.cache_clear()
    return code_version(methods)


def test_the_version_is_that_of_code_that_decides(package: Path) -> None:
    before = version()
    (package / "core" / "one.py").write_text('"""Said better."""\n\nx = 1\n')
    (package / "cli" / "one.py").write_text("x = 2\n")
    (package / "backbones" / "card.md").write_text("more")
    assert version() == before
    (package / "core" / "one.py").write_text("x = 2\n")
    changed = version()
    (package / "execution" / "one.py").write_text("x = 2\n")
    assert len({before, changed, version()}) == 3


def test_records_and_libraries_count(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = version()
    (package / "tasks" / "glue.yaml").write_text("version: 1\n")
    after = version()
    monkeypatch.setattr(source, "LIBRARIES", ("numpy",))
    assert len({before, after, version()}) == 3
    assert set(library_versions()) == {"numpy"}


def test_another_method_leaves_the_version_of_a_cell_as_it_is(package: Path) -> None:
    (package / "methods" / "lora.py").write_text("x = 1\n")
    before = version(("lora",)), version(("one",)), version(("elsewhere",))
    (package / "methods" / "dora.py").write_text("x = 1\n")
    assert version(("lora",)) == before[0]
    (package / "methods" / "lora.py").write_text("x = 2\n")
    after = version(("lora",)), version(("one",)), version(("elsewhere",))
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, False]
