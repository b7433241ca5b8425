"""Three tasks on docstrings: whose it is, whether two halves belong together, and what it names."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

from deltatune.tasks.embedded.builder import SIZES, Builder, Built
from deltatune.tasks.embedded.docstrings import PACKAGES, Docstring, docstrings, versions
from deltatune.tasks.embedded.near_duplicates import opening, split_apart
from deltatune.tasks.example import SplitName
from deltatune.tasks.text import digest, normalise

__all__ = ["DOCSTRING_BUILDERS"]

Parts = dict[SplitName, list[Docstring]]

# What a package calls itself would give the answer away.
_OWN_NAMES = re.compile(
    r"\b(python|cpython|numpy|np|ndarray|ndarrays|torch|pytorch|aten|transformers|hugging ?face|"
    r"huggingface_hub|hub|hf)\b",
    re.IGNORECASE,
)
_MASK = "X"
_SUMMARY_WORDS, _BODY_WORDS = 30, 40
_LEAST_BODY_WORDS = 8
_MOST_PER_NAME = 5
_MOST_NAME_WORDS = 5
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def _shown(docstring: Docstring) -> str:
    return _first_words(docstring.text, _SUMMARY_WORDS + _BODY_WORDS)


def _parts(found: Iterable[Docstring]) -> Parts:
    """Returns the docstrings by split, in an order of their texts' hashes, each shown text once."""
    once = {normalise(_shown(docstring)): docstring for docstring in found}
    parts = split_apart(once.values(), text=_shown, key=lambda docstring: opening(docstring.text))
    return {name: sorted(part, key=lambda d: digest(d.text)) for name, part in parts.items()}


def _evenly(part: Sequence[Docstring], total: int, even: bool = True) -> dict[str, list[Docstring]]:
    """Returns as many docstrings of each package, `total` at most; or each package's share."""
    by_package = {label: [d for d in part if d.package == label] for label in PACKAGES}
    if not even:
        return {label: found[: total // len(PACKAGES)] for label, found in by_package.items()}
    count = min(total // len(PACKAGES), *(len(found) for found in by_package.values()))
    return {label: found[:count] for label, found in by_package.items()}


def _masked(text: str) -> str:
    return _OWN_NAMES.sub(_MASK, text)


def _build_package() -> Built:
    return {
        name: _by_hash(
            {"text": _masked(_shown(docstring)), "package": docstring.package}
            for group in _evenly(part, SIZES[name]).values()
            for docstring in group
        )
        for name, part in _parts(docstrings()).items()
    }


def _build_match() -> Built:
    # Two docstrings with one body would make a right pair of a wrong one.
    whole = [d for d in docstrings() if len(d.body.split()) >= _LEAST_BODY_WORDS]
    once = {normalise(_first_words(d.body, _BODY_WORDS)): d for d in whole}
    return {
        name: _by_hash(
            pair
            for group in _evenly(part, SIZES[name], even=False).values()
            for pair in _pairs(group)
        )
        for name, part in _parts(once.values()).items()
    }


def _pairs(group: Sequence[Docstring]) -> list[dict[str, Any]]:
    """Returns right pairs from half of a package's docstrings and wrong ones from the other half.

    The bodies of the second half move on by one, so that every summary and every body is used once
    and neither half alone tells the answer.
    """
    half = len(group) // 2
    right, wrong = group[: len(group) - half], group[len(group) - half :]
    pairs = [(docstring, docstring.body, "yes") for docstring in right]
    if half > 1:
        moved = [*wrong[1:], wrong[0]]
        pairs += [(d, other.body, "no") for d, other in zip(wrong, moved, strict=True)]
    return [
        {
            "summary": _first_words(docstring.summary, _SUMMARY_WORDS),
            "body": _first_words(body, _BODY_WORDS),
            "match": answer,
        }
        for docstring, body, answer in pairs
    ]


def _build_name() -> Built:
    functions = [d for d in docstrings() if d.is_function and _name_words(d)]
    times = collections.Counter(docstring.name for docstring in functions)
    telling = [d for d in functions if times[d.name] <= _MOST_PER_NAME]
    return {
        name: _by_hash(
            {"text": _shown(docstring), "name": _name_words(docstring)}
            for docstring in part[: SIZES[name]]
        )
        for name, part in _parts(telling).items()
    }


def _name_words(docstring: Docstring) -> str | None:
    name = docstring.name.strip("_")
    words = name.split("_")
    if not _NAME.fullmatch(name) or len(name) < 3 or len(words) > _MOST_NAME_WORDS:
        return None
    return " ".join(words)


def _by_hash(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=digest)


DOCSTRING_BUILDERS = {
    "docstring_package": Builder(1, versions, _build_package),
    "docstring_match": Builder(1, versions, _build_match),
    "docstring_name": Builder(1, versions, _build_name),
}
"""Name to builder."""
