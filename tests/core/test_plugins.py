"""Methods of other distributions: one file and its entry point, and nothing else touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
GROUP = "deltatune.methods"
SCALE_ROWS = '''\
"""Row scaling: W' = diag(l) W.

Nobody et al. 2024, arXiv:2401.00001. l starts at one.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.leaf import ones
from deltatune.core.method import Category, Method, ReviewCategory, register


@register("scale_rows")
@dataclass(frozen=True, kw_only=True)
class ScaleRows(Method):
    """A gain of every row."""

    aliases: ClassVar[tuple[str, ...]] = ("row_scaling",)
    category: ClassVar[Category] = "addition"
    review_category: ClassVar[ReviewCategory] = "additive"
    count: ClassVar[str] = "d"
    default_at: ClassVar[str] = "attention.k | attention.v"
    learning_rate: ClassVar[float] = 3e-3

    def init(self, site):
        return {"l": ones(site.outputs)}

    def weight(self, W, b, p):
        return p["l"].unsqueeze(-1) * W, b
'''
CALL = """\
import json, sys
from pathlib import Path
from deltatune.core.card import cards, find_card
from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse
from deltatune.core.method import METHODS
"""
Declare = Callable[..., Path]


@pytest.fixture
def declare(tmp_path: Path) -> Declare:
    """Writes a distribution: one module, and the metadata that declares its entry points."""

    def write(module: str, text: str, group: str = GROUP, name: str | None = None) -> Path:
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        entry = f"[{group}]\n{name or module} = {module}\n"
        (metadata / "entry_points.txt").write_text(entry)
        return tmp_path

    return write


def run(folder: Path, code: str) -> str:
    """What a process prints that has the folder on its path."""
    path = os.pathsep.join((str(ROOT / "src"), str(folder)))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:deltatune", "-c", CALL + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_of_another_distribution_is_found_and_holds_the_laws(declare: Declare) -> None:
    folder = declare("scale_rows", SCALE_ROWS)
    printed = run(
        folder,
        """
assert METHODS["lora"].name == "lora" and METHODS._declared is None  # no one looked further
assert "scale_rows" in list(METHODS) and "scale_rows" not in sys.modules
assert str(parse("scale_rows(at='attention.q') + lora")) == "scale_rows(at='attention.q') + lora"
assert str(parse("row_scaling")) == "scale_rows"
card = find_card("scale_rows")
assert card in cards() and card.title == "Row scaling" and card.works and card.mergeable
from deltatune.testing.methods import Case, laws
for family in ("t5", "llama"):
    for law in laws():
        folder = Path(f"{family}-{law.__name__}")
        folder.mkdir()
        law(Case("scale_rows", family), folder)
print(len(laws()))
""",
    )
    assert int(printed) > 10


def test_a_broken_distribution_is_named_and_breaks_no_other(declare: Declare) -> None:
    declare("scale_rows", SCALE_ROWS)
    declare("broken", "import there_is_no_such_module\n")
    taken = SCALE_ROWS.replace('"row_scaling"', '"houlsby"').replace('"scale_rows"', '"taken"')
    folder = declare("taken", taken)
    silent = SCALE_ROWS.replace("Nobody et al. 2024", "Nobody").replace("scal", "sil")
    declare("silent", silent, name="sile_rows")
    printed = run(
        folder,
        """
assert str(parse("row_scaling")) == "scale_rows"
for name in ("broken", "taken", "broken"):
    try:
        parse(name)
    except ConfigurationError as error:
        print(error)
assert parse("scale_rows").methods[0].name == "scale_rows"
assert parse("houlsby").methods[0].name == "adapter"
found = {card.name: card for card in cards()}
assert found["scale_rows"].works and found["lora"].works and found["lora"].paper
for name in ("broken", "taken"):
    assert not found[name].works and name in found[name].reason
assert found["sile_rows"].works and found["sile_rows"].faces == ("weight",)
try:
    find_card("sile_rows")
except ConfigurationError as error:
    assert str(error) == found["sile_rows"].notes
    print(error)
from deltatune.cli import main
try:
    main(["methods"])
except SystemExit as stop:
    assert not stop.code
""",
    )
    told = printed.splitlines()
    assert (
        told[0]
        == told[2]
        == "The method 'broken' of the distribution 'broken' cannot be "
        + (
            "loaded: ModuleNotFoundError: No module named 'there_is_no_such_module'. Mend or "
            "uninstall it."
        )
    )
    assert "of the distribution 'taken' cannot be loaded: ConfigurationError" in told[1]
    assert "cannot be found as 'houlsby': the method 'adapter' is" in told[1]
    assert told[3].startswith("sile_rows: the docstring of its file must be 'TITLE: FORMULA.'")
    assert any(line.startswith("broken ") and "does not work here" in line for line in told)


def test_an_entry_point_must_register_its_name(
    declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(declare("registers_nothing", "", "test.nothing", "mine"))
    registry: Registry[object] = Registry("method", group="test.nothing")
    assert list(registry) == ["mine"] and "mine" in registry
    with pytest.raises(ConfigurationError, match=r"'mine' of .* 'registers_nothing' is not there"):
        registry["mine"]
    with pytest.raises(UnknownNameError, match=r"no method 'mines'.*'mine'"):
        registry["mines"]


def test_a_name_that_two_distributions_declare_is_no_ones(
    declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare("first_of_two", "", "test.two", "mine")
    monkeypatch.syspath_prepend(declare("second_of_two", "", "test.two", "mine"))
    registry: Registry[object] = Registry("method", group="test.two")
    with pytest.raises(ConfigurationError, match=r"'mine' is declared by .*_of_two' and"):
        registry["mine"]


def test_a_name_that_is_taken_is_left_out_with_a_warning(
    declare: Declare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(declare("takes_a_name", "", "test.taken", "json"))
    registry: Registry[object] = Registry("method", group="test.taken")
    registry.add_lazy("json", "json")
    with pytest.warns(UserWarning, match="'json' of .*'takes_a_name' is left out"):
        assert list(registry) == ["json"]
    assert list(registry) == ["json"]
