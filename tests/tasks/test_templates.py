from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, DataError
from deltatune.tasks.templates import evaluate, render, variables, variables_of_expression


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        ("{{ x | strip }}", " a\nb ", "a\nb"),
        ("{{ x | nl }}", "a\nb ", "a b "),
        ("{{ x | clean }}", "  a\n\\n\r\tb   c ", "a b c"),
        ("{{ x | join }}", ["a", 1], "a 1"),
        ("{{ x | bs_n }}", "a\\nb\nc", "a b\nc"),
        ("{{ x | squash }}", "Big Data", "bigdata"),
        ("q{{ x | choices }}", ["first", "second"], "q (A) first (B) second"),
        ("{{ x | nearest(0.2) }}", 2.5, "2.4"),
        ("{{ x | nearest(0.2) }}", 5, "5.0"),
        ("{{ x | flat }}", "a\n b\tc\r", "a  b c "),
        ('{{ x | replace("\n", " [n] ") }}', "a\nb", "a [n] b"),
        ('{{ x | removeprefix("a ") }}', "a a b", "a b"),
        ("{{ x | length }}", [1, 2], "2"),
        ("{{ x | option('B') }}", ["first", "second"], "second"),
        ("{{ x | option('0') }}{{ x | option(1) }}", ["a", "b"], "ab"),
        ("{{ x | option('1', first=1) }}", ["a", "b"], "a"),
        ("{{ x | options | join }}", "More (A) or less, or (B) the same?", "or less, the same?"),
        ("{{ x | where([1, 2, 1], [1]) | join }}", ["a", "b", "c"], "a c"),
        ("{{ x | column('n') | distinct | join }}", [{"n": [["b"], ["a"]]}, {"n": ["b"]}], "a b"),
        ("{{ x | each('strip') | join }}", [" a ", "b "], "a b"),
        ("{{ x | majority }}", [2, 0, 2], "2"),
        ("{{ x | majority is none }}", [0, 1, 2, 2], "True"),
        ("{{ x | majority is none }}", [], "True"),
        ("{{ x }}\n", "<&>", "<&>\n"),
    ],
)
def test_filters(template: str, value: object, expected: str) -> None:
    assert render(template, {"x": value}, "here") == expected


@given(st.permutations(["cell", "atom", "cell wall", "a"]))
def test_the_order_of_the_shuffled_is_that_of_their_content(items: list[str]) -> None:
    shown = render("{{ x | shuffled | join }}", {"x": items}, "here")
    assert sorted(shown.split()) == ["a", "atom", "cell", "cell", "wall"]
    assert shown == render("{{ x | shuffled | join }}", {"x": sorted(items)}, "here")


def test_each_option_is_shuffled_to_each_place() -> None:
    places = set()
    for number in range(60):
        shown = render("{{ x | shuffled | join }}", {"x": ["a", f"b{number}", "c"]}, "here")
        places.add(shown.split().index("a"))
    assert places == {0, 1, 2}


def test_variables() -> None:
    assert variables("{{ a }} {{ b | strip }}") == {"a", "b"}


def test_an_unknown_filter_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'strip'"):
        variables("{{ a | stripp }}")


def test_filters_of_jinja_itself_are_not_there() -> None:
    with pytest.raises(ConfigurationError, match="no template filter 'upper'"):
        variables("{{ a | upper }}")


def test_a_broken_template() -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        variables("{{ a ")


def test_an_expression_gives_a_value() -> None:
    assert evaluate("x.y", {"x": {"y": [1, 2]}}, "here") == [1, 2]
    assert evaluate("x | length == 2", {"x": "ab"}, "here") is True
    assert variables_of_expression("[x, y.z] | length") == {"x", "y"}
    with pytest.raises(ConfigurationError, match="Did you mean 'length'"):
        variables_of_expression("x | lenght")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        variables_of_expression("x ==")


@pytest.mark.parametrize(
    "expression", ["missing", "x.missing", "x.__class__", "x.__class__.__mro__", "x | length"]
)
def test_an_expression_that_has_no_value_names_the_place(expression: str) -> None:
    with pytest.raises(DataError, match="file:3"):
        evaluate(expression, {"x": 1}, "file:3")


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}",
        "{{ x | strip }}",
        "{{ x.__class__ }}",
        "{{ ['a'] | option(x) }}",
        "{{ ['a'] | option('C') }}",
        "{{ 'a (B) b' | options }}",
        "{{ 'no letters' | options }}",
        "{{ ['a'] | each('stripp') }}",
        "{{ ['a', 'b'] | where([1], [1]) }}",
        "{{ [{'a': 1}] | column('b') }}",
    ],
)
def test_a_template_that_cannot_be_filled_names_the_place(template: str) -> None:
    with pytest.raises(DataError, match="file:3"):
        render(template, {"x": 1}, "file:3")
