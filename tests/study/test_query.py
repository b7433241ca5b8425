"""Queries: what they find is what the rows hold; nothing else can be reached; errors teach."""

from __future__ import annotations

import builtins
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.study.test_comparison import compare
from tests.study.test_flat import store_of
from tests.study.test_store import make_cell

from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.study.flat import COLUMNS, flatten
from deltatune.study.query import query
from deltatune.study.store import MemoryStore, Store


@pytest.fixture(scope="module")
def store() -> Store:
    store = MemoryStore()
    compare(store, methods=("full", "bitfit"))
    return store


def test_a_query_finds_what_the_rows_hold(store: Store) -> None:
    sql = "select method, avg(score) as mean from cells where task = 'emotion' group by method"
    answer = query(store, sql)
    assert answer.columns == ("method", "mean")
    rows = [row for row in flatten(store).rows if row["task"] == "emotion"]
    for method, mean in answer.rows:
        scores = [row["score"] for row in rows if row["method"] == method]
        assert mean == pytest.approx(statistics.fmean(scores))
    assert {method for method, _ in answer.rows} == {"full", "bitfit"}


def test_every_column_is_asked_for_without_quotes(store: Store) -> None:
    for column in flatten(store).columns:
        if column.path[-1].isidentifier():
            answer = query(store, f"select {column.name} from cells")
            expected = [row[column.name] for row in flatten(store).rows]
            assert [row[0] for row in answer.rows] == expected, column.name
    stars = [name.removesuffix(".*") for name in COLUMNS if name.endswith(".*")]
    for star in stars:
        assert query(store, f"select {star} from cells limit 1").rows


def test_names_that_are_no_identifiers_are_quoted(store: Store) -> None:
    sql = """select scores."Classification-F1" from cells where task = 'emotion' limit 1"""
    assert query(store, sql).rows[0][0] > 0


def test_curves_join_their_cells(store: Store) -> None:
    sql = "select count(*), max(step) from curve join cells using (id) where method = 'full'"
    cells = query(store, "select count(*) from cells where method = 'full'").rows[0][0]
    assert query(store, sql).rows == ((10 * cells, 300),)


def test_what_is_not_finite_stays_so() -> None:
    found = store_of(make_cell(), scores={"ACC": math.nan, "other": -math.inf})
    ((score, other),) = query(found, "select score, scores.other from cells").rows
    assert math.isnan(score) and other == -math.inf


def test_an_empty_study_has_tables_too() -> None:
    assert query(MemoryStore(), "select score, settings.learning_rate from cells").rows == ()
    assert query(MemoryStore(), "select options, versions from cells").rows == ()
    assert query(MemoryStore(), "select step from curve").rows == ()


secret = [{"a": 1}]


@pytest.mark.parametrize(
    ("sql", "error", "message"),
    [
        ("select scor from cells", UnknownNameError, "no column 'scor'. Did you mean 'score'"),
        ("select c.scor from cells c", UnknownNameError, "Did you mean 'score'"),
        (
            "select settings.lerning_rate from cells",
            UnknownNameError,
            "Did you mean 'settings.learning_rate'",
        ),
        ("select stpe from curve", UnknownNameError, "'step'"),
        (
            'select "settings.learning_rate" from cells',
            ConfigurationError,
            "Quotes stand around its parts, where they must: settings.learning_rate",
        ),
        ("select * from cels", UnknownNameError, "no table 'cels'. Did you mean 'cells'"),
        ("selec 1", ConfigurationError, "syntax error at or near .selec.*describe cells"),
        ("select 1; select 2", ConfigurationError, "is one SELECT.*Found SELECT, SELECT"),
        ("", ConfigurationError, "Found nothing"),
        ("drop table cells", ConfigurationError, "changes nothing. Found DROP"),
        ("delete from cells returning *", ConfigurationError, "Found DELETE"),
        ("set threads = 1", ConfigurationError, "Found SET"),
        ("install httpfs", ConfigurationError, "Found LOAD"),
        ("select * from read_csv('/etc/hosts')", ConfigurationError, "files and the network"),
        ("select * from read_text('{file}')", ConfigurationError, "files and the network"),
        ("select * from '{file}'", ConfigurationError, "files and the network"),
        ("copy cells to '{file}'", ConfigurationError, "Found COPY"),
        ("attach '{file}' as other", ConfigurationError, "Found ATTACH"),
        ("select * from secret", UnknownNameError, "no table 'secret'"),
        ("select id + 1 from cells", ConfigurationError, "No function matches"),
    ],
)
def test_a_query_that_cannot_be_answered_is_one_line(
    store: Store, sql: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.csv"
    file.write_text("a\n1\n", encoding="utf-8")
    with pytest.raises(error, match=message) as raised:
        query(store, sql.format(file=file))
    assert "\n" not in str(raised.value)
    assert file.read_text(encoding="utf-8") == "a\n1\n"


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets imports of a package fail."""
    whole = builtins.__import__

    def refuse(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return whole(name, globals, locals, fromlist, level)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_missing_library_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    without("duckdb", monkeypatch)
    with pytest.raises(UnsupportedError, match=r"pip install 'deltatune\[study\]'"):
        query(store, "select 1")
