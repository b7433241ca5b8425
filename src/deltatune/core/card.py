"""Cards: what is known of a method or a preset, as fields.

Nothing is written twice: title, formula and paper are read from the docstring of the method's
module (the text of a preset), the rest from its class. That text is strictly of this form:

    TITLE: FORMULA.

    Authors Year, arXiv:NNNN.NNNNN. What differs from the authors' code, initial values, limits.

Where there is no arXiv number the venue stands in its place; a second paper follows behind "; ".
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import Expression
from deltatune.core.method import FACES, MERGED, METHODS, Face, Method
from deltatune.core.presets import ABSENT, PRESETS, Absent, Preset

__all__ = ["Card", "card_of", "cards", "find_card"]

_HEAD = re.compile(r"(?P<title>[^:]+): (?P<formula>.+)\.")
_PAPER = r"(?:[^\d.;:]|et al\.)+ (?:19|20)\d\d, (?:arXiv:\d{4}\.\d{4,5}|[^.;:]+)"
_BODY = re.compile(rf"(?P<paper>{_PAPER}(?:; {_PAPER})*)\.(?: (?P<notes>.+))?")
_YEAR = re.compile(r"(?:19|20)\d\d(?=, )")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A method or a preset, as fields.

    Attributes:
        name: by which it is listed.
        kind: what the name stands for.
        title, formula, paper, year: as its text gives them; the year is that of the first paper.
        notes: what the text says behind the paper: what differs from the authors' code, initial
            values, limits.
        summary: what it is, in a line.
        aliases: other names that are read.
        category: after Ding et al. 2023; of a preset those of its methods.
        review_category: after Xu et al. 2023; of a sum hybrid.
        faces: of its methods, each once.
        at: the target it takes where none is given; None for a preset, whose methods have each
            their own.
        count: entries trained at one site, in the symbols of docs/methods.md.
        learning_rate: to start a search from; of a preset that of its most sensitive method.
        identity: whether a fresh delta leaves the model's function unchanged.
        mergeable: whether the kernel writes all of it into weights.
        works: whether an expression may name it.
        reason: why it does not work.
        nearest: the expression that comes nearest to what does not work.
        expression: what a preset stands for.
    """

    name: str
    kind: Literal["method", "preset"]
    title: str = ""
    formula: str = ""
    paper: str = ""
    year: int | None = None
    notes: str = ""
    summary: str = ""
    aliases: tuple[str, ...] = ()
    category: str = ""
    review_category: str = ""
    faces: tuple[Face, ...] = ()
    at: str | None = None
    count: str = ""
    learning_rate: float | None = None
    identity: bool | None = None
    mergeable: bool = False
    works: bool = True
    reason: str | None = None
    nearest: str | None = None
    expression: str | None = None


def card_of(method: type[Method]) -> Card:
    """The card of a method.

    Raises ConfigurationError if its module's docstring is not of the form, or it lacks
    `review_category` or `count`.
    """
    for key in ("review_category", "count"):
        if not isinstance(getattr(method, key, None), str):
            raise ConfigurationError(
                f"{method.name}: the class variable {key}, a text, is missing. Give it one."
            )
    return Card(
        name=method.name,
        kind="method",
        summary=(inspect.getdoc(method) or "").partition("\n")[0],
        aliases=method.aliases,
        category=method.category,
        review_category=method.review_category,
        faces=(method.face,),
        at=method.default_at,
        count=method.count,
        learning_rate=method.learning_rate,
        identity=method.identity,
        mergeable=method.face in MERGED,
        **_read(sys.modules[method.__module__].__doc__, method.name),
    )


def cards() -> tuple[Card, ...]:
    """The cards of all methods and presets, and of what does not work, by name.

    A method of another distribution that cannot be loaded is among the last; one whose card cannot
    be made has one that says so.
    """
    found = [
        *map(_of_listed, METHODS),
        *(_of_preset(name, preset) for name, preset in PRESETS.items()),
        *(_of_absent(name, absent) for name, absent in ABSENT.items()),
    ]
    return tuple(sorted(found, key=lambda card: card.name))


def find_card(name: str) -> Card:
    """The card of a name or an alias. Raises UnknownNameError, ConfigurationError (`card_of`)."""
    if name in ABSENT:
        return _of_absent(name, ABSENT[name])
    preset = PRESETS.canonical(name)
    return card_of(METHODS[name]) if preset is None else _of_preset(preset, PRESETS[preset])


def _of_listed(name: str) -> Card:
    try:
        method = METHODS[name]
    except ConfigurationError as error:
        return Card(name=name, kind="method", works=False, reason=str(error))
    try:
        return card_of(method)
    except ConfigurationError as error:
        return Card(name=name, kind="method", faces=(method.face,), notes=str(error))


def _of_preset(name: str, preset: Preset) -> Card:
    methods = Expression.of(preset.expression).methods
    faces = {method.face for method in methods}
    text = _read(preset.text, name)
    return Card(
        name=name,
        kind="preset",
        summary=text["title"],
        aliases=preset.aliases,
        category=" + ".join(dict.fromkeys(method.category for method in methods)),
        review_category="hybrid" if len(methods) > 1 else methods[0].review_category,
        faces=tuple(face for face in FACES if face in faces),
        count=" + ".join(dict.fromkeys(method.count for method in methods)),
        learning_rate=min(method.learning_rate for method in methods),
        identity=all(method.identity for method in methods),
        mergeable=faces <= set(MERGED),
        expression=str(Expression(methods)),
        **text,
    )


def _of_absent(name: str, absent: Absent) -> Card:
    text = _read(absent.text, name)
    return Card(
        name=name,
        kind="method",
        summary=text["title"],
        category=absent.category,
        review_category=absent.review_category,
        count=absent.count,
        works=False,
        reason=absent.reason,
        nearest=absent.nearest,
        **text,
    )


def _read(text: str | None, name: str) -> dict[str, Any]:
    """Title, formula, paper, year and notes of a text. Raises ConfigurationError."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", (text or "").strip())]
    head = _HEAD.fullmatch(paragraphs[0])
    body = _BODY.fullmatch(paragraphs[1]) if len(paragraphs) > 1 else None
    if head is None or body is None:
        raise ConfigurationError(
            f"{name}: the docstring of its file must be 'TITLE: FORMULA.', a blank line, and "
            "'Authors Year, arXiv:NNNN.NNNNN.' with notes behind it; found "
            f"{' '.join(paragraphs[:2])[:120]!r}."
        )
    year = _YEAR.search(body["paper"])
    assert year is not None  # it is part of the paper's form
    notes = "\n\n".join(filter(None, [body["notes"], *paragraphs[2:]]))
    return {**head.groupdict(), "paper": body["paper"], "year": int(year[0]), "notes": notes}
