"""Minimal pairs of our own, in the manner of BLiMP (Warstadt et al. 2020, arXiv:1912.00582).

Each pair is one acceptable sentence and one that breaks a single rule of English grammar. The split
of a pair depends on a hash of its head noun alone: no noun that is tested on is trained on in the
same role.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from importlib.resources import files

import yaml

from deltatune.tasks.embedded.builder import SIZES, Builder, Built
from deltatune.tasks.embedded.near_duplicates import split_apart
from deltatune.tasks.text import digest, fraction

__all__ = ["MINIMAL_PAIRS"]

_WORDS: dict[str, str] = yaml.safe_load((files(__package__) / "words.yaml").read_text("utf-8"))
_IRREGULAR = dict(word.split(":") for word in _WORDS["irregular_plurals"].split())

Pair = dict[str, str]
_PER_PHENOMENON = 1_500
_DRAWN_PER_NOUN = 60


def _words(name: str) -> list[str]:
    return _WORDS[name].split()


def _plural(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def _third_person(verb: str) -> str:
    return f"{verb}es" if verb.endswith(("s", "x", "ch", "sh")) else f"{verb}s"


def _pair(phenomenon: str, head: str, good: str, bad: str) -> Pair:
    return {
        "phenomenon": phenomenon,
        "head": head,
        "sentence_good": good[0].upper() + good[1:] + ".",
        "sentence_bad": bad[0].upper() + bad[1:] + ".",
    }


def _subject_verb() -> Iterator[Pair]:
    """The verb agrees with the head of its subject, not with the nearer noun."""
    nouns = dict.fromkeys((*_words("people"), *_words("animals")))
    for noun, verb, place, thing in _mixed(nouns, "alone", "places", "things"):
        many, crowd = (fraction(word, noun, verb, place, thing) < 0.5 for word in ("many", "crowd"))
        head, near = (_plural(noun) if many else noun), (_plural(thing) if crowd else thing)
        subject = f"the {head} behind the {near} near the {place}"
        good, bad = (verb, _third_person(verb)) if many else (_third_person(verb), verb)
        yield _pair("subject_verb", noun, f"{subject} {good}", f"{subject} {bad}")


def _anaphor_gender() -> Iterator[Pair]:
    """A reflexive agrees in gender with the subject."""
    for gender, good, bad in (("female", "herself", "himself"), ("male", "himself", "herself")):
        for noun, verb, place, thing in _mixed(_words(gender), "towards", "places", "things"):
            start, end = f"the {noun} from the {place} {verb}", f"near the {thing}"
            yield _pair("anaphor_gender", noun, f"{start} {good} {end}", f"{start} {bad} {end}")


def _anaphor_number() -> Iterator[Pair]:
    """A reflexive agrees in number with the subject."""
    for noun, verb, place, thing in _mixed(_words("people"), "towards", "places", "things"):
        start, end = f"the {_plural(noun)} from the {place} {verb}", f"near the {thing}"
        good, bad = f"{start} themselves {end}", f"{start} itself {end}"
        yield _pair("anaphor_number", noun, good, bad)


def _determiner_noun() -> Iterator[Pair]:
    """A demonstrative agrees in number with its noun, across an adjective."""
    for noun, verb, name, adjective in _mixed(_words("things"), "handling", "names", "adjectives"):
        for one, many in (("this", "these"), ("that", "those")):
            plural = fraction(one, noun, verb, name, adjective) < 0.5
            word, start = (_plural(noun) if plural else noun), f"{name} {verb.split(':')[1]}"
            good, bad = (many, one) if plural else (one, many)
            end = f"{adjective} {word}"
            yield _pair("determiner_noun", noun, f"{start} {good} {end}", f"{start} {bad} {end}")


def _polarity() -> Iterator[Pair]:
    """`ever` needs a negative subject."""
    for noun, verb, place, thing in _mixed(_words("people"), "done", "places", "things"):
        single = fraction("single", noun, verb, place, thing) < 0.5
        good, bad, auxiliary = ("no", "every", "has") if single else ("few", "some", "have")
        head = noun if single else _plural(noun)
        end = f"{head} from the {place} {auxiliary} ever {verb} near the {thing}"
        yield _pair("polarity", noun, f"{good} {end}", f"{bad} {end}")


def _tense() -> Iterator[Pair]:
    """After `did not` the verb stands in its bare form."""
    for noun, verb, name, adjective in _mixed(_words("things"), "handling", "names", "adjectives"):
        good, bad = verb.split(":")
        start, end = f"{name} did not", f"the {adjective} {noun}"
        yield _pair("tense", noun, f"{start} {good} {end}", f"{start} {bad} {end}")


def _mixed(nouns: Iterable[str], *names: str) -> Iterator[tuple[str, ...]]:
    """Yields some combinations of each noun with the words of three lists, drawn by hash."""
    lists = [_words(name) for name in names]
    for noun in nouns:
        drawn = (
            (
                noun,
                *(
                    words[int(fraction(noun, *names, i, j) * len(words))]
                    for j, words in enumerate(lists)
                ),
            )
            for i in range(_DRAWN_PER_NOUN)
        )
        yield from dict.fromkeys(drawn)


_PHENOMENA = (
    _subject_verb, _anaphor_gender, _anaphor_number, _determiner_noun, _polarity, _tense,
)  # fmt: skip


def _build() -> Built:
    pairs = [
        pair
        for phenomenon in _PHENOMENA
        for pair in sorted(phenomenon(), key=digest)[:_PER_PHENOMENON]
    ]
    parts = split_apart(
        pairs,
        text=lambda pair: pair["sentence_good"],
        key=lambda pair: f"{pair['phenomenon']} {pair['head']}",
    )
    return {name: _evenly(part, SIZES[name]) for name, part in parts.items()}


def _evenly(pairs: list[Pair], total: int) -> list[Pair]:
    """Returns at most an equal share of `total` of each phenomenon, in an order of their hashes."""
    groups = collections.defaultdict(list)
    for pair in sorted(pairs, key=digest):
        groups[pair["phenomenon"]].append(pair)
    share = total // len(_PHENOMENA)
    return sorted((pair for group in groups.values() for pair in group[:share]), key=digest)


MINIMAL_PAIRS = Builder(1, lambda: "deltatune's own word lists", _build)
