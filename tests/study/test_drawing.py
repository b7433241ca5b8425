"""Figures as SVG: what stands in them, where, and that the same figure gives the same bytes."""

from __future__ import annotations

import itertools
import re
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.study.canvas import printable, short
from deltatune.study.drawing import draw, front
from deltatune.study.placing import Box, placed
from deltatune.study.rank_diagram import cliques
from deltatune.study.section import Bars, Figure, HeatMap, Lines, Place, Ranks, Scatter, Series

SPACE = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><b>&'\" $x_1$ \x00\ud800"
NUMBERS = st.floats(-1e9, 1e9).map(lambda value: round(value, 6)) | st.sampled_from(
    [float("nan"), float("inf"), 0.0]
)
NAMES = st.text(min_size=1, max_size=40)


def line(name: str, *ys: float) -> Series:
    return Series(name, tuple((float(x), y) for x, y in enumerate(ys, 1)))


FIGURES: tuple[Figure, ...] = (
    Lines(
        "Curves",
        "steps",
        "score",
        (
            Series("lora", ((1, 2.0), (10, 3.0)), ((1.5, 2.5), (2.0, 3.5)), ringed=frozenset([1])),
            line(HOSTILE, 1, 2),
        ),
        logarithmic=True,
    ),
    Scatter("Cloud", "parameters", "score", (Place("lora", 9e3, 70.0), Place(HOSTILE, 2e6, 80.0))),
    Scatter(
        "Zero",
        "parameters",
        "score",
        (Place("none", 0, 7), Place("a", 3e4, 8), Place("b", 2e6, 9)),
        True,
    ),
    Bars("Memory", "MiB", {"lora": {"weights": 3.0, HOSTILE: 1.0}, "full": {"weights": 9.0}}),
    HeatMap("Transfer", ("a", HOSTILE), ("c", "d", "e"), ((0.1, 0.25, None), (0.3, 12.5, -1.0))),
    Ranks("Ranks", {"lora": 1.25, HOSTILE: 1.75, "bitfit": 3.0}, 0.9),
)


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter(f"{SPACE}text")]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_a_figure_is_one_element_that_says_what_it_is(figure: Figure) -> None:
    svg = draw(figure)
    assert svg == draw(figure)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SPACE}svg" and root.get("aria-label") == figure.title
    for foreign in ("metadata", "<style", "font-family", "<?xml", "http://www.w3.org/1999"):
        assert foreign not in svg
    assert "currentColor" in svg and "#000000" not in svg, "text and axes are those of the page"
    assert re.findall(r"\d\.\d{3}", re.sub(r'style="[^"]*"', "", svg)) == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_names_are_text_and_nothing_else(figure: Figure) -> None:
    svg = draw(figure)
    assert "<b>" not in svg and "script>" not in svg
    if HOSTILE in repr(figure) or "script" in repr(figure):
        found = " ".join(texts(svg))
        assert "</script><b>&'\" $x_1$ \ufffd\ufffd" in found


def test_ids_are_those_that_are_used_and_differ_between_figures() -> None:
    ids = [re.findall(r' id="([^"]+)"', draw(figure)) for figure in FIGURES]
    assert any(ids)
    for svg, own in zip(map(draw, FIGURES), ids, strict=True):
        assert set(own) == set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    assert not any(set(one) & set(other) for one, other in itertools.combinations(ids, 2))


def test_series_beyond_the_palette_have_dashes_and_those_without_points_keep_their_colour() -> None:
    first, *rest = (line(f"arm {n}", n, n + 1) for n in range(12))
    whole = draw(Lines("a", "x", "y", (first, *rest)))
    assert whole.count("stroke-dasharray") == 4, "two lines and their legend"
    without = draw(Lines("a", "x", "y", (Series("arm 0", ()), *rest)))
    assert "#0072b2" not in without.split("stroke-dasharray")[0]
    assert "arm 0" not in texts(without) and "arm 1" in texts(without)


def test_figures_write_their_values() -> None:
    assert {"0.1", "0.25", "12.5", "-1"} <= set(texts(draw(FIGURES[4])))
    assert {"4", "9", "weights"} <= set(texts(draw(FIGURES[3])))
    assert "lora  1.25" in texts(draw(FIGURES[5]))
    assert "critical difference 0.9" in texts(draw(FIGURES[5]))
    assert {"0", "1M"} <= set(texts(draw(FIGURES[2])))
    assert "no values" in texts(draw(Lines("a", "x", "y", (line("b", float("nan")),))))
    assert [short(v) for v in (93.351, 3e-4, 12345, 11.5e6, 0.0)] == [
        "93.35",
        "0.0003",
        "12.35k",
        "11.5M",
        "0",
    ]


def test_points_have_their_names_beside_them_or_numbers_where_there_is_no_room() -> None:
    few = draw(Scatter("a", "x", "y", tuple(Place(f"arm {n}", n, n % 3) for n in range(5))))
    assert {"arm 0", "arm 4"} <= set(texts(few))
    crowd = tuple(Place(f"method with the name {n}", 1 + n % 4 / 99, n / 99) for n in range(11))
    full = texts(draw(Scatter("a", "x", "y", (*crowd, Place("far", 9, 9)))))
    assert {"1", "12", "12: far", "1: method with the name 0"} <= set(full)
    many = texts(draw(Scatter("a", "x", "y", (*crowd, Place("low", 9, 0), Place("far", 9, 9)))))
    assert {"far", "method with the name 8"} <= set(many), "of more, those of the front"
    assert not {"low", "method with the name 7"} & set(many)


PLACES = st.tuples(st.floats(0, 300), st.floats(0, 200))


@given(st.lists(st.tuples(PLACES, st.tuples(st.floats(5, 90), st.floats(8, 30))), max_size=8))
def test_names_that_cover_nothing_are_apart_and_inside(
    found: list[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    points, sizes = [point for point, _ in found], [size for _, size in found]
    inside = Box(0, 0, 300, 200)
    free = [spot.box for spot in placed(points, sizes, [], inside) if not spot.covered]
    for box in free:
        assert box.left >= -0.01 and box.lower >= -0.01
        assert box.right <= 300.01 and box.upper <= 200.01
    for one, other in itertools.combinations(free, 2):
        across = min(one.right, other.right) - max(one.left, other.left)
        up = min(one.upper, other.upper) - max(one.lower, other.lower)
        assert across <= 0 or up <= 0 or across * up < 0.001


@given(st.lists(st.builds(Place, NAMES, st.integers(0, 9), st.integers(0, 9)), max_size=9))
def test_the_front_holds_whatever_is_beaten_by_none(places: list[Place]) -> None:
    found = front(places)
    assert all(a.x < b.x and a.y < b.y for a, b in itertools.pairwise(found))
    for place in places:
        beaten = any(o.x <= place.x and o.y >= place.y for o in found)
        assert beaten or not places


@given(st.lists(st.floats(1, 20), max_size=9).map(sorted), st.floats(0, 20))
def test_two_ranks_stand_under_one_bar_where_they_cannot_be_told_apart(
    ranks: list[float], distance: float
) -> None:
    found = cliques(ranks, distance)
    for first, last in itertools.combinations(range(len(ranks)), 2):
        together = any(a <= first and last <= b for a, b in found)
        assert together == (ranks[last] - ranks[first] < distance)
    assert not any(a <= c and d <= b for (a, b), (c, d) in itertools.permutations(found, 2))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(NAMES, NUMBERS, NUMBERS), min_size=1, max_size=4), st.booleans())
def test_any_names_and_numbers_can_be_drawn(
    found: list[tuple[str, float, float]], logarithmic: bool
) -> None:
    names = tuple(name for name, _, _ in found)
    series = tuple(Series(name, ((x, y), (y, x)), ((x, y), (x, y))) for name, x, y in found)
    figures: tuple[Figure, ...] = (
        Lines(names[0], names[0], names[0], series, logarithmic),
        Scatter("a", "x", "y", tuple(Place(*one) for one in found), logarithmic),
        Bars("a", "y", {name: {"one": x, "two": y} for name, x, y in found}),
        HeatMap("a", names, names[:2], tuple((x, y)[: len(names[:2])] for _, x, y in found)),
        Ranks("a", {name: min(abs(x), 50.0) for name, x, _ in found}, abs(found[0][2])),
    )
    for figure in figures:
        svg = draw(figure)
        assert printable(svg) == svg
        assert ElementTree.fromstring(svg).get("aria-label") == printable(figure.title)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a band at 1 points around a line of 2"):
        Series("a", ((1, 2), (2, 3)), ((1, 2),))
    with pytest.raises(ConfigurationError, match="under 2 columns and 1 names"):
        HeatMap("a", ("b",), ("c", "d"), ((1.0,),))


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'deltatune\[study\]'"):
        draw(FIGURES[0])
