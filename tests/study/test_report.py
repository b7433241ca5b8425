"""Reports as pages: what is written how, that texts stay texts, and that nothing else is needed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.study.html import Page

from deltatune.core.errors import StateError, UnsupportedError
from deltatune.study.report import render, write
from deltatune.study.section import Column, Lines, Section, Series, Table, Value
from deltatune.study.summary import Spread

HOSTILE = "</script><b>&'\"{{ 7 * 7 }}"
SCORES = (Column("Task"), Column("lora", "score"), Column("full", "score"))
CURVE = Lines("Curve", "x", "y", (Series("lora", ((1.0, 2.0), (2.0, 3.0))),))


def page(*parts: Table | Lines, sections: int = 1) -> Page:
    found = [Section(f"Section {n}", parts=parts) for n in range(sections)]
    return Page(render("Title", "Subtitle", [("Seeds", "3")], found))


Kind = Literal["text", "score", "points", "percent", "number", "count"]


def written(kind: Kind, value: Value) -> str:
    return page(Table("T", (Column("C", kind),), ((value,),))).cells[1][0]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("text", "a", "a"),
        ("text", 0.25, "0.25"),
        ("score", 0.93351, "93.35"),
        ("score", Spread((0.5, 0.6)), "55.00 ±7.07"),
        ("score", Spread((0.5,)), "50.00"),
        ("points", 0.0123, "+1.23"),
        ("points", Spread((-0.02, -0.04)), "-3.00 ±1.41"),
        ("percent", 0.0003097, "0.031%"),
        ("percent", 1.0, "100%"),
        ("number", 0.00012345, "0.0001234"),
        ("number", 123456.7, "123,457"),
        ("number", Spread((1.0, 2.0)), "1.5"),
        ("count", 11_500_000.0, "11,500,000"),
        ("count", None, "-"),
        ("score", float("nan"), "not a number"),
    ],
)
def test_values_are_written_as_their_column_says(kind: Kind, value: Value, text: str) -> None:
    assert written(kind, value) == text


def test_every_kind_of_column_is_tested_above() -> None:
    kinds = get_args(get_type_hints(Column)["kind"])
    marks = test_values_are_written_as_their_column_says.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(kinds)


@pytest.mark.parametrize(
    ("row", "bold"),
    [
        (("a", 0.5, 0.6), 1),
        (("a", 0.60001, 0.60002), 2),  # as they are written
        (("a", None, 0.1), 0),  # nothing to be better than
        (("a", float("nan"), None), 0),
        (("a", "60%", "50%"), 0),
    ],
)
def test_the_best_of_at_least_two_scores_is_bold(row: tuple[Value, ...], bold: int) -> None:
    assert page(Table("T", SCORES, (row,), best_of="row")).tags.count("strong") == bold
    alone = tuple(value for place, value in enumerate(row) if place < 2)
    assert "strong" not in page(Table("T", SCORES[:2], (alone,), best_of="row")).tags


def test_long_names_of_code_are_broken_at_their_joints() -> None:
    arm = "lora(at='attention.q|attention.k') & <b>"
    table = Table("T", (Column("task"), Column(arm, "score")), (("blimp_" * 9, 0.5), ("a_b", 0.4)))
    html = render("T", "", [], [Section("S", parts=(table,))])
    broken = "lora(<wbr>at=<wbr>&#39;attention.q|<wbr>attention.k&#39;) &amp; &lt;b&gt;"
    assert f'<button type="button">{broken}</button>' in html
    assert ">" + "blimp_<wbr>" * 9 + "<" in html and ">a_b<" in html
    assert [text for text, _ in Page(html).cells][1:3] == [arm, "blimp_" * 9]


def test_the_best_of_a_column_is_bold_where_arms_are_rows() -> None:
    arms: tuple[tuple[Value, ...], ...] = (("a", 0.5, 0.7), ("b", 0.6, None), ("c", 0.4, 0.3))
    rows = (*arms, ("sum", 0.9, 0.9))
    table = Table("T", SCORES, rows, averages=frozenset([3]), best_of="column")
    html = render("T", "", [], [Section("S", parts=(table,))])
    assert re.findall("<strong>(.*?)</strong>", html) == ["70.00", "60.00"]
    assert "strong" not in page(replace(table, best_of="nothing")).tags


def test_rows_that_sum_up_are_marked_and_the_rest_is_sorted_by_numbers() -> None:
    rows: tuple[tuple[Value, ...], ...] = (("a", 0.5, None), ("Average", 0.25, "x"))
    html = render("T", "", [], [Section("S", parts=(Table("T", SCORES, rows, frozenset([1])),))])
    assert html.count('<tr class="average">') == 1
    cells = Page(html).cells[3:]
    assert [cell[1].get("data-number") for cell in cells] == [None, "0.5", None, None, "0.25", None]
    assert ["data-missing" in cell[1] for cell in cells] == [False, False, True, *[False] * 3]


def test_long_reports_have_contents_that_lead_to_their_sections() -> None:
    assert [r for r in page(sections=3).references if r.startswith("#")] == []
    found = page(sections=4)
    links = [r.removeprefix("#") for r in found.references if r.startswith("#")]
    assert links == [f"section-{n}" for n in (1, 2, 3, 4)] and set(links) <= set(found.ids)


def test_a_report_asks_for_nothing_else() -> None:
    html = render("T", "S", [], [Section("S", parts=(CURVE,))])
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in html
    assert all(r.startswith(("#", "data:")) for r in Page(html).references)
    assert "@import" not in html and "url(http" not in html


def test_texts_of_all_places_are_texts() -> None:
    table = Table(HOSTILE, (Column(HOSTILE),), ((HOSTILE,),), note=HOSTILE)
    curve = Lines(HOSTILE, HOSTILE, HOSTILE, (Series(HOSTILE, ((1.0, 2.0),)),))
    sections = [Section(HOSTILE, HOSTILE, (HOSTILE,), (table, curve))] * 4
    html = render(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], sections)
    found = Page(html)
    assert "b" not in found.tags and found.tags.count("script") == 1 and "49" not in found.texts
    # Title twice, subtitle, a fact twice; contents; heading, beside, paragraph, and of the table
    # title, header, cell and note; of the figure its caption, its axes and a legend.
    assert sum(HOSTILE in text for text in found.texts) == 5 + 4 * (1 + 3 + 4 + 4)
    assert render("a\x00\ud800", "", [], []).encode().count("\ufffd".encode()) == 4


TEXTS = st.text(max_size=20)
VALUES = (
    st.none()
    | TEXTS
    | st.floats()
    | st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3).map(lambda v: Spread(tuple(v)))
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    kinds = st.sampled_from(["text", "score", "percent", "number", "count"])
    columns = tuple(draw(st.lists(st.builds(Column, TEXTS, kinds), min_size=1, max_size=4)))
    rows = draw(st.lists(st.tuples(*[VALUES] * len(columns)), max_size=4))
    averages = draw(st.frozensets(st.integers(0, 3)))
    return Table(draw(TEXTS), columns, tuple(rows), averages, draw(TEXTS))


@settings(max_examples=100, deadline=None)
@given(st.lists(tables(), max_size=2), TEXTS)
def test_any_tables_make_a_well_formed_page_that_is_always_the_same(
    found: list[Table], text: str
) -> None:
    sections = [Section(text, text, (text,), tuple(found))]
    html = render(text, text, [(text, text)], sections)
    assert html == render(text, text, [(text, text)], sections)
    html.encode()
    parsed = Page(html)
    assert parsed.open == [] and len(set(parsed.ids)) == len(parsed.ids)
    size = sum(len(table.columns) * (1 + len(table.rows)) for table in found)
    assert len(parsed.cells) == size


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = Section("S", parts=(CURVE,))
    path = write(tmp_path / "report.html", "T", "", [], [section])
    assert path.read_text(encoding="utf-8") == render("T", "", [], [section])
    with pytest.raises(StateError, match="Cannot write the report"):
        write(tmp_path / "none" / "report.html", "T", "", [], [])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="matplotlib"):
        write(tmp_path / "other.html", "T", "", [], [section])
    write(tmp_path / "tables.html", "T", "", [], [Section("S")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "tables.html"]
