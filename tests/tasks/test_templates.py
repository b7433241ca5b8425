from __future__ import annotations

import pytest

from deltatune.core.errors import ConfigurationError, DataError
from deltatune.tasks.templates import render, variables


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
        ("{{ x }}\n", "<&>", "<&>\n"),
    ],
)
def test_filters(template: str, value: object, expected: str) -> None:
    assert render(template, {"x": value}, "here") == expected


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


@pytest.mark.parametrize("template", ["{{ missing }}", "{{ x | strip }}", "{{ x.__class__ }}"])
def test_a_template_that_cannot_be_filled_names_the_place(template: str) -> None:
    with pytest.raises(DataError, match="file:3"):
        render(template, {"x": 1}, "file:3")
