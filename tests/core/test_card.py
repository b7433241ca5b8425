"""Cards: what is known of a method or a preset, read from its text and its class."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, get_args

import pytest
import torch
from tests.methods.test_conformance import METHODS as METHODS_OF_SUITE
from torch import Tensor

from deltatune import api
from deltatune.core.card import Card, card_of, cards, find_card
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.core.grammar import parse
from deltatune.core.method import METHODS, Category, Leaves, Method, ReviewCategory
from deltatune.core.presets import ABSENT, PRESETS
from deltatune.testing.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
ALL = cards()
ABSENT_HERE = {"coda", "longlora", "loraprune", "attention_fusion", "s3delta", "autopeft"}
TEXT = """Mine: W' = 2 W,
every entry.

Hu et al. 2021, arXiv:2106.09685; Liu and
Li 2022, Findings of NAACL. It starts at one.

And it ends there."""


@pytest.mark.parametrize("card", ALL, ids=lambda card: card.name)
def test_every_card_says_all_that_it_should(card: Card) -> None:
    assert card.title and card.formula and card.summary and card.count
    assert re.search(r"[^\W\d].* (19|20)\d\d, (arXiv:\d{4}\.\d{4,5}|\w.*)", card.paper)
    assert card.year is not None and 1990 < card.year < 2030
    assert set(card.category.split(" + ")) <= set(get_args(Category))
    assert card.review_category in get_args(ReviewCategory)
    assert (card.reason is None) is (card.nearest is None) is card.works
    if card.works:
        assert card.faces and card.learning_rate is not None and card.learning_rate > 0


def test_names_and_aliases_mean_one_thing_each() -> None:
    names = [name for card in ALL for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() and name == name.lower() for name in names)
    assert [card.name for card in ALL] == sorted({*METHODS, *PRESETS, *ABSENT})
    for card in ALL:
        assert all(find_card(name) == card for name in (card.name, *card.aliases))
        assert card.works is (card.name not in ABSENT_HERE)
    assert set(ABSENT) == ABSENT_HERE


def test_the_fields_of_one() -> None:
    card = card_of(METHODS["dora"])
    assert card.title == "DoRA" and card.kind == "method"
    assert (
        card.formula == "W' = m V / |V| with V = W + (alpha / rank) B A, |V| the norms of its rows"
    )
    assert card.paper == "Liu et al. 2024, arXiv:2402.09353" and card.year == 2024
    assert card.notes.startswith("m starts at the norms of the rows of W, so that")
    assert card.category == "reparameterisation" and card.review_category == "reparameterised"
    assert card.faces == ("weight",) and card.mergeable and card.identity
    assert card.count == "r (i + d) + d" and card.expression is None


def made(monkeypatch: pytest.MonkeyPatch, text: str | None) -> type[Method]:
    """A method whose file begins with a text."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        """Twice the weight."""

        name: ClassVar[str] = "mine"
        category: ClassVar[Category] = "addition"
        review_category: ClassVar[ReviewCategory] = "additive"
        count: ClassVar[str] = "1"
        default_at: ClassVar[str] = "linear"
        learning_rate: ClassVar[float] = 1e-3

        def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
            return 2 * W, b

    module = ModuleType("mine", text)
    monkeypatch.setitem(sys.modules, "mine", module)
    Mine.__module__ = "mine"
    return Mine


def test_a_text_is_read_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_of(made(monkeypatch, TEXT))
    assert (card.title, card.formula) == ("Mine", "W' = 2 W, every entry")
    assert card.paper == "Hu et al. 2021, arXiv:2106.09685; Liu and Li 2022, Findings of NAACL"
    assert card.year == 2021 and card.notes == "It starts at one.\n\nAnd it ends there."


@pytest.mark.parametrize(
    "text",
    [
        None,
        "Mine.\n\nHu et al. 2021, arXiv:2106.09685.",
        "Mine: W.",
        "Mine: W\n\nHu et al. 2021, arXiv:2106.09685.",
        "Mine: W.\n\nHu et al., arXiv:2106.09685.",
        "Mine: W.\n\nHu et al. 2021.",
        "Mine: W.\n\nHu et al. 2021, arXiv:2106.09685: a note.",
        "Mine: W.\n\nBy chance. Hu et al. 2021, arXiv:2106.09685.",
        "Mine: W.\nHu et al. 2021, arXiv:2106.09685.",
    ],
)
def test_a_text_of_another_form_is_refused(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="mine: the docstring of its file must be 'TITLE"):
        card_of(made(monkeypatch, text))


@pytest.mark.parametrize("key", ["count", "review_category"])
def test_a_class_without_a_field_of_the_card_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made(monkeypatch, TEXT)
    delattr(mine, key)
    with pytest.raises(ConfigurationError, match=f"mine: the class variable {key}.* is missing"):
        card_of(mine)


@pytest.mark.parametrize("method", METHODS_OF_SUITE)
def test_what_the_card_calls_mergeable_the_kernel_merges(method: str) -> None:
    model = FAMILIES["bert"].build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    delta = api.attach(model, method)
    if all(card_of(type(part)).mergeable for part in parse(method)):
        delta.merge()
        delta.unmerge()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    else:
        with pytest.raises(UnsupportedError, match="cannot be written into"):
            delta.merge()


def test_a_preset_is_the_sum_of_its_methods() -> None:
    card = find_card("mix_and_match")
    assert (card.name, card.kind) == ("mam", "preset")
    assert card.expression == "prefix(length=30) + parallel(bottleneck=512)"
    assert card.faces == ("output", "attend") and not card.mergeable and not card.identity
    assert card.category == "addition" and card.review_category == "hybrid"
    assert card.count == "L (k + v) + im + md + m + d"
    assert card.learning_rate == min(method.learning_rate for method in parse("mam"))
    assert find_card("lora_all").review_category == "reparameterised"
    with pytest.raises(UnknownNameError, match="Did you mean 'mam'"):
        find_card("mamm")


def test_the_tables_of_the_page_are_those_of_the_cards() -> None:
    place = importlib.util.spec_from_file_location("cards", ROOT / "scripts" / "cards.py")
    assert place is not None and place.loader is not None
    script = importlib.util.module_from_spec(place)
    place.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "docs/methods.md is stale: run `make cards`"
    assert script.page(text.replace("Houlsby et al. 2019, arXiv", "Anybody")) == text
