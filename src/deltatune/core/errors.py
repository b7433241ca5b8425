"""What can go wrong, by kind. Every message says what was expected, what was found and what to do.

    DeltatuneError
    ├── ConfigurationError      a value, key or combination that cannot be meant
    │   └── UnknownNameError    a name that is not in its list; carries the nearest matches
    ├── TargetError             a target that matches nothing, or matches what a face cannot use
    ├── UnsupportedError        a backbone that cannot take what was asked of it
    ├── StateError              an operation that is not legal in the present state of a delta
    ├── ArtefactError           a delta's files: missing, truncated, malformed, of another version
    │   └── BackboneMismatchError   the delta was made for another backbone
    ├── DataError               a data file, a column, a label
    └── TrainingError           a run that cannot go on, for example on a loss that is not finite

The command line turns each of them into one line on standard error and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtefactError",
    "BackboneMismatchError",
    "ConfigurationError",
    "DataError",
    "DeltatuneError",
    "StateError",
    "TargetError",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedError",
    "nearest",
]


class DeltatuneError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigurationError(DeltatuneError, ValueError):
    """A value, a key or a combination of them that cannot be meant."""


class TargetError(DeltatuneError, LookupError):
    """A target that matches no site of this backbone, or a site that the face cannot use."""


class UnsupportedError(DeltatuneError):
    """This backbone cannot take what was asked of it."""


class StateError(DeltatuneError, RuntimeError):
    """An operation that is not legal in the present state of a delta."""


class ArtefactError(DeltatuneError):
    """The files of a delta are missing, truncated, malformed or of another version."""


class BackboneMismatchError(ArtefactError):
    """The delta was made for another backbone."""


class DataError(DeltatuneError, ValueError):
    """A data file, a column or a label that cannot be used."""


class TrainingError(DeltatuneError, RuntimeError):
    """A run that cannot go on."""


class UnknownNameError(ConfigurationError, LookupError):
    """A name that is not in its list.

    Args:
        kind: what the name should have been, in the singular ("method", "task", "key").
        name: the name found.
        known: the names that exist.
        others: names that may have been meant, but are not in the list.
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], others: Iterable[str] = ()
    ) -> None:
        names = sorted(known)
        close = nearest(name, sorted({*names, *others}))
        if close:
            hint = f"Did you mean {' or '.join(repr(n) for n in close)}?"
        elif names:
            hint = f"Known: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
        else:
            hint = "None is known."
        super().__init__(f"There is no {kind} {name!r}. {hint}")
        self.kind, self.name, self.nearest = kind, name, close


def nearest(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Returns up to `count` of the `known` names that resemble `name`, the closest first."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name.casefold(), list(by_folded), n=count, cutoff=0.5)
    return tuple(by_folded[folded] for folded in found)
