"""The grammar: one strict text for Python, YAML and the shell."""

from __future__ import annotations

import dataclasses
import string
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.grammar import Expression, parse, render, split_methods
from deltatune.core.method import METHODS, Method
from deltatune.core.mixer import Mixer
from deltatune.methods.adapter import Adapter
from deltatune.methods.lora import LoRA

TEXT = st.text(st.sampled_from(string.ascii_letters + " '\"|\\.:*()[],+=é\n"), max_size=12)
MIXERS = {name for name in METHODS if issubclass(METHODS[name], Mixer)}
KINDS: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(10**6), 10**6),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: TEXT,
    type(None): st.none(),
}


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """A registered method with any values that it accepts."""
    kind = METHODS[draw(st.sampled_from(sorted(set(METHODS) - MIXERS)))]
    return drawn(draw, kind)


@st.composite
def terms(draw: st.DrawFn) -> Expression:
    """A method, or a mixer of some that it can weigh."""
    if draw(st.booleans()):
        return Expression.of(draw(methods()))
    mixer = drawn(draw, METHODS[draw(st.sampled_from(sorted(MIXERS)))])
    assert isinstance(mixer, Mixer)
    try:
        return mixer.over(*draw(st.lists(methods(), min_size=1, max_size=3)))
    except ConfigurationError:
        return type(mixer)().over("lora", "bitfit")


def drawn(draw: st.DrawFn, kind: type[Method]) -> Method:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        if draw(st.booleans()) and field.name != "members":
            types = typing.get_args(hints[field.name]) or (hints[field.name],)
            arguments[field.name] = draw(st.one_of(*(KINDS[t] for t in types)))
    try:
        return kind(**arguments)
    except ConfigurationError:
        return kind()


@settings(max_examples=150, deadline=None)
@given(st.lists(terms(), min_size=1, max_size=4))
def test_what_is_written_reads_the_same(made: list[Expression]) -> None:
    expression = sum(made[1:], made[0])
    assert parse(str(expression)) == expression
    assert split_methods(", ".join([str(expression)] * 2)) == (str(expression),) * 2
    assert Expression(tuple(method for one in made for method in one)) == expression


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | TEXT)
def test_any_other_text_is_refused_in_words(text: str) -> None:
    try:
        expression = parse(text)
    except ConfigurationError as error:
        assert str(error)
    else:
        assert parse(str(expression)) == expression


def test_every_field_is_named_and_every_value_has_its_kind() -> None:
    assert parse("lora(rank=4, at='attention.q') + bitfit") == (
        LoRA(rank=4, at="attention.q") + METHODS["bitfit"]()
    )
    assert render(LoRA()) == "lora"
    assert parse("lora(alpha=16)") == parse("lora")
    for wrong in (
        "lora(4)",
        "lora(rank=4.5)",
        "lora(rank=True)",
        "lora(rank='4')",
        "lora(rank=-1)",
    ):
        with pytest.raises(ConfigurationError):
            parse(wrong)


@pytest.mark.parametrize(
    "wrong",
    (
        ["", "lora(", "lora(rank=)", "lora +", "lora / adapter", "lora(**{})", "lora.rank", "3"],
        ["lora(rank=open('x'))", "lora(rank=1, rank=2)", "lora\0", "(" * 300, "'lora'"],
        ["lora(alpha=1e999)"],
    ),
)
def test_what_is_not_written_in_it(wrong: list[str]) -> None:
    for text in wrong:
        with pytest.raises(ConfigurationError):
            parse(text)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no method 'lorra'.*'lora'"):
        parse("lorra(rank=8)")
    with pytest.raises(UnknownNameError, match=r"no argument of lora 'rnk'.*'rank'"):
        parse("lora(rnk=8)")
    with pytest.raises(UnknownNameError, match=r"no activation 'gelo'.*'gelu'"):
        parse("adapter(activation='gelo')")


def test_lists_are_cut_at_commas_outside_of_parentheses() -> None:
    text = "full, lora(rank=4, at='a, b') + adapter , bitfit,"
    assert split_methods(text) == ("full", "lora(rank=4, at='a, b') + adapter", "bitfit")
    assert split_methods(" ") == ()


def test_the_shorthand_places_what_has_no_place_of_its_own() -> None:
    placed = parse("lora + adapter(at='ffn') + head").at("attention.k")
    assert str(placed) == "lora(at='attention.k') + adapter(at='ffn') + head"
    assert parse("full").at("attention.k") == parse("full")
    assert parse("lora").at(None) == parse("lora")
    with pytest.raises(ConfigurationError, match="takes no target"):
        parse("full(at='ffn')")


def test_patterns_keep_their_backslashes() -> None:
    assert parse(r"lora(at='re:.*\.q')").methods[0].at == r"re:.*\.q"


def test_only_methods_are_methods() -> None:
    assert Expression.of(Adapter()) == parse("adapter")
    with pytest.raises(ConfigurationError, match="found int"):
        Expression.of(3)  # type: ignore[arg-type]


def test_a_method_has_one_face_and_is_registered_once() -> None:
    with pytest.raises(TypeError, match="exactly one"):

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Two(LoRA):
            def output(self, x: Any, y: Any, p: Any) -> Any:
                return y

    with pytest.raises(ConfigurationError, match="registered already"):
        METHODS.add("lora", Adapter)
