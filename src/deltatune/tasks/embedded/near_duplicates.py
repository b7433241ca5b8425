"""Splits of texts that no near-duplicate straddles.

A text's split depends on a hash of its own first words alone, so a text that is the same up to
case, punctuation and its tail falls into the same split, and a new text never moves another.
Near-duplicates that begin differently are then found by the overlap of their shingles (runs of
three words, Broder 1997): whatever resembles a text of a later split is left out of the earlier
one. Nothing moves; rows only go.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from deltatune.tasks.example import SplitName
from deltatune.tasks.text import fraction, normalise

__all__ = ["RESEMBLANCE", "opening", "resemblance", "shingles", "split_apart", "split_of"]

T = TypeVar("T")

RESEMBLANCE = 0.5
"""Share of common shingles from which on two texts are near-duplicates."""

_WORDS = re.compile(r"\w+")
_OPENING_WORDS = 12
_SHINGLE_WORDS = 3
_BOUNDS: tuple[tuple[SplitName, float], ...] = (("train", 0.8), ("validation", 0.9), ("test", 1.0))


def _words(text: str) -> list[str]:
    return _WORDS.findall(normalise(text))


def opening(text: str) -> str:
    """Returns the first twelve words of `text`, case and punctuation aside."""
    return " ".join(_words(text)[:_OPENING_WORDS])


def split_of(key: str) -> SplitName:
    """Returns the split that a hash of `key` falls into: 80 % train, 10 % validation, 10 % test."""
    position = fraction("split", key)
    return next(name for name, bound in _BOUNDS if position < bound)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Returns the runs of three words of `text`; the whole of it if it is shorter."""
    words = _words(text)
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return frozenset(tuple(words[start : start + _SHINGLE_WORDS]) for start in range(count))


def resemblance(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """Returns the Jaccard index of two sets of shingles, in [0, 1]."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def split_apart(
    items: Iterable[T], text: Callable[[T], str], key: Callable[[T], str]
) -> dict[SplitName, list[T]]:
    """Splits `items` by the hash of their keys and drops what resembles a later split.

    Args:
        items: anything.
        text: what is compared.
        key: what decides on the split.
    """
    parts: dict[SplitName, list[T]] = {"train": [], "validation": [], "test": []}
    for item in items:
        parts[split_of(key(item))].append(item)
    taken = _Index(text(item) for item in parts["test"])
    parts["validation"] = _without(parts["validation"], text, taken)
    for item in parts["validation"]:
        taken.add(text(item))
    parts["train"] = _without(parts["train"], text, taken)
    return parts


def _without(items: Sequence[T], text: Callable[[T], str], taken: _Index) -> list[T]:
    return [item for item in items if not taken.resembles(text(item))]


class _Index:
    """Texts by shingle, to find those that share enough of them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        found = shingles(text)
        for shingle in found:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(found))

    def resembles(self, text: str) -> bool:
        own = shingles(text)
        shared: collections.Counter[int] = collections.Counter()
        for shingle in own:
            shared.update(self._holders.get(shingle, ()))
        return any(
            common / (len(own) + self._sizes[other] - common) >= RESEMBLANCE
            for other, common in shared.items()
        )
