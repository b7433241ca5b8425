"""The filters of templates and expressions: a closed list, with nothing of jinja2's own.

Each is a function of a value of a row. One that meets a value it cannot use raises TypeError or
ValueError, which becomes the DataError of the row.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deltatune.core.errors import UnknownNameError
from deltatune.tasks.text import fraction

__all__ = ["FILTERS"]

_SPACES = re.compile(" +")
_LETTERED = re.compile(r"\(([A-Z])\)")
_ORDER_SEED = 42


def _newlines_to_spaces(text: str) -> str:
    return text.replace("\n", " ")


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ").replace("\t", " ")


def _clean(text: str) -> str:
    text = text.strip()
    for character in ("\n", "\\n", "\r", "\t"):
        text = text.replace(character, " ")
    return _SPACES.sub(" ", text)


def _join(items: Iterable[Any]) -> str:
    return " ".join(str(item) for item in items)


def _literal_newlines_to_spaces(text: str) -> str:
    return text.replace("\\n", " ")


def _squash(text: str) -> str:
    return text.replace(" ", "").lower()


def _choices(options: Iterable[Any]) -> str:
    return "".join(f" ({_letter(index)}) {option}" for index, option in enumerate(options))


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _option(options: Sequence[Any], key: Any, first: int = 0) -> Any:
    letter = isinstance(key, str) and len(key) == 1 and "A" <= key <= "Z"
    place = ord(key) - ord("A") if letter else int(key) - first
    if not 0 <= place < len(options):
        raise ValueError(f"there is no option {key!r} among {len(options)}")
    return options[place]


def _options(text: str) -> list[str]:
    parts = _LETTERED.split(text)
    letters, options = parts[1::2], parts[2::2]
    if not letters or letters != [_letter(index) for index in range(len(letters))]:
        raise ValueError(f"expected options (A), (B), ... in {text[-60:]!r}")
    return [option.strip().removesuffix(" or").strip() for option in options]


def _shuffled(items: Iterable[str]) -> list[str]:
    known = sorted(items)
    return sorted(known, key=lambda item: fraction(_ORDER_SEED, known, item))


def _where(items: Sequence[Any], values: Sequence[Any], wanted: Collection[Any]) -> list[Any]:
    return [item for item, value in zip(items, values, strict=True) if value in wanted]


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _distinct(items: Iterable[Any]) -> list[str]:
    return sorted(set(_leaves(items)))


def _leaves(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    else:
        for part in item:
            yield from _leaves(part)


def _each(items: Iterable[Any], name: str) -> list[Any]:
    if name not in FILTERS:
        raise ValueError(str(UnknownNameError("template filter", name, FILTERS)))
    return [FILTERS[name](item) for item in items]


def _majority(votes: Sequence[Any]) -> Any:
    if not votes:
        return None
    value, count = Counter(votes).most_common(1)[0]
    return value if 2 * count > len(votes) else None


def _nearest(value: Any, step: float) -> str:
    # T5 (arXiv:1910.10683, section 2.4) writes the scores of STS-B as multiples of 0.2 with one
    # digit.
    return f"{round(float(value) / step) * step:.1f}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _drop_last_character(text: str) -> str:
    return text[:-1]


def _strip_punctuation(text: str) -> str:
    return text.rstrip(string.punctuation)


FILTERS: Mapping[str, Callable[..., Any]] = {
    "strip": str.strip,
    "nl": _newlines_to_spaces,
    "flat": _flat,
    "clean": _clean,
    "join": _join,
    "bs_n": _literal_newlines_to_spaces,
    "squash": _squash,
    "replace": str.replace,
    "removeprefix": str.removeprefix,
    "length": len,
    "choices": _choices,
    "option": _option,
    "options": _options,
    "shuffled": _shuffled,
    "where": _where,
    "column": _column,
    "distinct": _distinct,
    "each": _each,
    "majority": _majority,
    "nearest": _nearest,
    "lower_first": _lower_first,
    "drop_last_char": _drop_last_character,
    "strip_punct": _strip_punctuation,
}
"""Filter name to function. `{{ text | clean }}` and so on; nothing of jinja2's own list is left.

`strip`; `nl` newline to space; `flat` newline, carriage return and tab to space; `clean` strip, all
white space to single spaces; `join` a list by spaces; `bs_n` literal `\\n` to space; `squash` no
spaces, lower case; `replace(old, new)`; `removeprefix(text)`; `length`; `choices` ` (A) first (B)
second`; `option(key)` the item that a letter or a number from 0 names (`first=1`: from 1);
`options` the texts behind (A), (B), ... within a text, without a closing "or"; `shuffled` texts in
an order that depends on all of them alone; `where(values, wanted)` the items whose counterpart in
`values` is among `wanted`; `column(name)` that entry of each item; `distinct` the texts in nested
lists, each once, sorted; `each(name)` a filter for each item; `majority` what more than half are,
else none; `nearest(0.2)` the nearest multiple, with one digit. Of the manual templates:
`lower_first` the first letter in lower case, `drop_last_char` all but the last, `strip_punct` no
punctuation at the end.
"""
