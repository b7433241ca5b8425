"""`deltatune methods`: what there is to tune with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import Json
from deltatune.cli.output import print_json, show

if TYPE_CHECKING:
    from deltatune.core.card import Card

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="One method or preset, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List methods and presets, or describe one."""
    from deltatune.core.card import cards, find_card

    if name is not None:
        card = find_card(name)
        if as_json:
            print_json({**dataclasses.asdict(card), "fields": _fields(card)})
        else:
            _show_one(card)
        return
    if as_json:
        print_json([dataclasses.asdict(card) for card in cards()])
        return
    from rich.table import Table

    table = Table(
        *("name", "kind", "category", "faces", "sits at", "what it does"),
        box=None,
        pad_edge=False,
    )
    for card in cards():
        told = card.summary if card.works else "does not work here"
        table.add_row(card.name, card.kind, card.category, ", ".join(card.faces), card.at, told)
    show(table)


def _fields(card: Card) -> dict[str, dict[str, Any]]:
    """The fields of a method; a preset has none, nor has what does not work."""
    from deltatune.core.method import METHODS

    if card.name not in METHODS or not card.works:
        return {}
    return {
        field.name: {"type": str(field.type), "default": field.default}
        for field in dataclasses.fields(METHODS[card.name])
    }


def _show_one(card: Card) -> None:
    show(f"{card.name}: {card.summary}")
    where = "" if card.at is None else f", sits at {card.at!r}"
    faces = f", face {', '.join(card.faces)}" if card.faces else ""
    show(f"category {card.category}{faces}{where}")
    show(f"after Xu et al. {card.review_category}; trains {card.count} entries per site")
    if card.expression is not None:
        show(f"a preset: {card.expression}")
    if card.works:
        merges = "can be merged" if card.mergeable else "cannot be merged"
        start = "the identity at the start" if card.identity else "not the identity at the start"
        show(f"{merges}; {start}; learning rate to start from {card.learning_rate:g}")
    else:
        show(f"does not work here: {card.reason}")
        show(f"nearest to it: {card.nearest}")
    if card.aliases:
        show(f"also called {', '.join(card.aliases)}")
    show("", f"{card.title}: {card.formula}", card.paper)
    if card.notes:
        show("", card.notes)
    fields = _fields(card)
    if fields:
        show("")
    for field, about in fields.items():
        show(f"  {field}: {about['type']} = {about['default']!r}")
