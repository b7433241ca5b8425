"""Exports: what is read back is what the study holds."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tests.study.test_comparison import compare
from tests.study.test_experiments import ran
from tests.study.test_flat import store_of
from tests.study.test_query import without
from tests.study.test_store import failed, make_cell

from deltatune.core.errors import ConfigurationError, StateError, UnknownNameError, UnsupportedError
from deltatune.study.export import FORMATS, export, tables, write_export
from deltatune.study.flat import flatten
from deltatune.study.latex import _escaped, as_latex, table_as_latex
from deltatune.study.plain import table_as_csv, table_as_markdown
from deltatune.study.section import Column, Table
from deltatune.study.store import MemoryStore, Store
from deltatune.study.summary import Spread, summarise
from deltatune.study.table import as_markdown


@pytest.fixture(scope="module")
def store() -> Store:
    store = MemoryStore()
    compare(store)
    store.append(failed(99))
    return store


def test_rows_come_back_from_json_and_parquet(store: Store) -> None:
    rows = list(flatten(store).rows)
    assert json.loads(export(store, "json")) == rows
    table = parquet.read_table(io.BytesIO(export(store, "parquet")))
    assert table.to_pylist() == rows
    assert str(table.schema.field("seed").type) == "int64"
    assert str(table.schema.field("settings.packing").type) == "bool"


def test_rows_come_back_from_csv_as_text(store: Store) -> None:
    rows = list(csv.DictReader(io.StringIO(export(store, "csv").decode())))
    expected = [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in flatten(store).rows
    ]
    assert rows == expected


def test_what_is_not_finite_is_null_in_json_alone() -> None:
    found = store_of(make_cell(), scores={"ACC": math.nan})
    assert json.loads(export(found, "json"))[0]["score"] is None
    table = parquet.read_table(io.BytesIO(export(found, "parquet")))
    assert math.isnan(table.to_pylist()[0]["score"])
    assert ",nan," in export(found, "csv").decode()


def test_an_empty_study_has_its_columns() -> None:
    columns = [column.name for column in flatten(MemoryStore()).columns]
    assert export(MemoryStore(), "json") == b"[]\n"
    assert export(MemoryStore(), "csv").decode().strip().split(",") == columns
    table = parquet.read_table(io.BytesIO(export(MemoryStore(), "parquet")))
    assert table.column_names == columns and table.num_rows == 0
    with pytest.raises(StateError, match="no comparison"):
        export(MemoryStore(), "latex")


def cells_of_latex(text: str) -> list[list[str]]:
    lines = [line.strip().removesuffix(r"\\").strip() for line in text.splitlines()]
    return [line.split(" & ") for line in lines if " & " in line]


def test_the_table_in_latex_says_what_markdown_says(store: Store) -> None:
    summary = summarise(store)
    text = as_latex(summary)
    body = [
        line.strip("|").split(" | ") for line in as_markdown(summary).splitlines() if "|" in line
    ]
    plain = [
        [re.sub(r"\\(?:textbf|emph)\{(.*)\}", r"\1", cell) for cell in line]
        for line in cells_of_latex(text)
    ]
    expected = [[_escaped(cell) for cell in line] for line in body if "---:" not in line[1]]
    assert [[cell.strip() for cell in line] for line in plain] == expected
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert text.count(r"\textbf") >= len(summary.rows("t5-mini"))
    assert r"11 rows of train stand in test too" in text
    assert export(store, "latex").decode() == text
    assert export(store, "markdown").decode() == as_markdown(summary)


def test_every_table_of_a_report_can_be_had() -> None:
    store = MemoryStore()
    ran("combination", store)
    known = tables(store)
    names = [name for name, one in known.items() if one.title == "Every subset"]
    assert names == ["t5-mini, all rows: Every subset", "t5-mini, 16 of each label: Every subset"]
    for form in ("markdown", "latex"):
        text = export(store, form).decode()
        assert all(
            export(store, form, name).decode().strip() in text for name in known if "_" not in name
        )
    head, *rows = list(csv.reader(io.StringIO(export(store, "csv", names[0]).decode())))
    assert head == [column.title for column in known[names[0]].columns]
    assert [float(row[-1]) for row in rows] == [row[-1] for row in known[names[0]].rows]
    with pytest.raises(
        ConfigurationError, match=r"several: .*16 of each label: Every subset. Name"
    ):
        export(store, "csv", "Every subset")
    with pytest.raises(UnknownNameError, match="Did you mean 'Interaction effects'"):
        export(store, "csv", "Interaction effect")
    with pytest.raises(ConfigurationError, match="json is for cells"):
        export(store, "json", names[0])


TABLE = Table(
    "Some",
    (Column("a|b"), Column("x & y", "score"), Column("z", "score")),
    (("one|two", Spread((0.5, 0.7)), 0.7), ("mean_of", 0.25, None), ("all", 0.5, 0.25)),
    averages=frozenset({1, 2}),
    note="100 % of it.",
    best_of="row",
)


def test_a_table_is_written_in_each_form() -> None:
    assert table_as_csv(TABLE).splitlines() == [
        'a|b,x & y,"x & y, deviation",z',
        f"one|two,0.6,{Spread((0.5, 0.7)).deviation},0.7",
        "mean_of,0.25,,",
        "all,0.5,,0.25",
    ]
    assert table_as_markdown(TABLE).splitlines() == [
        r"| a\|b | x & y | z |",
        "|---|---:|---:|",
        r"| one\|two | 60.00 ±14.14 | **70.00** |",
        "| mean_of | 25.00 | - |",
        "| all | **50.00** | 25.00 |",
        "",
        "100 % of it.",
    ]
    latex = table_as_latex(TABLE, "A_b")
    assert r"\caption{A\_b}" in latex and r"\begin{tabular}{@{}lrr@{}}" in latex
    assert r"one\textbar{}two & 60.00 $\pm$14.14 & \textbf{70.00} \\" in latex
    assert r"\emph{mean\_of} & \emph{25.00} & \emph{-} \\" in latex
    assert r"\emph{all} & \textbf{50.00} & \emph{25.00} \\" in latex
    assert r"100 \% of it." in latex


SPECIAL = "\\{}~^<>|[&%$#_"


@given(st.text())
def test_nothing_in_latex_is_a_command_that_was_none(text: str) -> None:
    """Taking our own spellings away leaves no character that TeX would act on."""
    escaped = _escaped(text)
    for ours in (r"\\text[a-z]+\{\}", r"\{\[\}", r"\\[{}&%$#_]", r"\$\\pm\$"):
        escaped = re.sub(ours, "", escaped)
    assert not set(escaped) & set(SPECIAL) and "\n" not in escaped


def test_an_export_is_written_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    path = write_export(store, "csv", tmp_path / "cells.csv")
    assert path.read_bytes() == export(store, "csv")
    with pytest.raises(StateError, match="Cannot write the export"):
        write_export(store, "csv", tmp_path / "none" / "cells.csv")
    with pytest.raises(UnknownNameError, match="Did you mean 'parquet'"):
        write_export(store, "parket", tmp_path / "cells")
    assert [one.name for one in tmp_path.iterdir()] == ["cells.csv"]
    assert list(FORMATS) == ["json", "parquet", "csv", "latex", "markdown"]


def test_a_missing_library_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    without("pyarrow", monkeypatch)
    with pytest.raises(UnsupportedError, match=r"pip install 'deltatune\[study\]'"):
        export(store, "parquet")
