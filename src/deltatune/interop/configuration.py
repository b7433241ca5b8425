"""A configuration of another library, held to closed lists of keys.

A key is read, or must have one of few values, or acts in training alone. Any other key is an error
that names it: it may change what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from deltatune.core.errors import ArtefactError

__all__ = ["COMMON", "MODULES", "Configuration", "Keys"]

_LARGEST = 2**31


@dataclass(frozen=True)
class Keys:
    """Which keys a kind of configuration has.

    Attributes:
        read: those that say what is computed, with PEFT's values where they are absent.
        only: those of which few values are known here; the first is the one where it is absent.
        idle: those that say how it began, how it is trained or where it is from.
    """

    read: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    def __or__(self, other: Keys) -> Keys:
        only = {**self.only, **other.only}
        return Keys({**self.read, **other.read}, only, self.idle | other.idle)


COMMON = Keys(
    read={"peft_type": None, "task_type": None},
    idle=frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"})
    | frozenset({"revision"}),
)  #: of every kind
MODULES = COMMON | Keys(
    read={
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    },
    only={"bias": ("none",)},
    # The storage of a module says how its weight lies, and PEFT corrects the key by it.
    idle=frozenset({"fan_in_fan_out", "init_weights"}),
)  #: of the kinds that act at modules


class Configuration:
    """The values of one configuration, those that are absent filled in.

    Args:
        where: the file, as errors name it.
        values: what it says.
        keys: what it may say.
        library: whose it is, as errors name it.

    Raises ArtefactError for a key that is not known, or a value that is not.
    """

    def __init__(
        self, where: str, values: Mapping[str, Any], keys: Keys, library: str = "PEFT 0.21"
    ) -> None:
        self.where = where
        unknown = sorted(values.keys() - keys.read.keys() - keys.only.keys() - keys.idle)
        if unknown:
            raise ArtefactError(
                f"{where}: the {'key' if len(unknown) == 1 else 'keys'} {', '.join(unknown)} may "
                "change what is computed, and deltatune does not know how. Remove what does not "
                f"matter, or save the delta with {library}."
            )
        for key, allowed in keys.only.items():
            value = values.get(key, allowed[0])
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise ArtefactError(
                    f"{where}: {key}={value!r} has no counterpart in deltatune, which reads "
                    f"{' or '.join(f'{key}={one!r}' for one in allowed)} exactly."
                )
        self.values = {**keys.read, **values}

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raises ArtefactError for the value of a key."""
        found = repr(self.values.get(key))
        shown = found if len(found) <= 80 else f"{found[:77]}..."
        raise ArtefactError(f"{self.where}: {key} must be {expected}; it is {shown}.")

    def whole(self, key: str) -> int:
        """A whole number."""
        value = self.values.get(key)
        return value if type(value) is int else self.refuse(key, "a whole number")

    def count(self, key: str, *, zero: bool = False) -> int:
        """How many of something, from one on; with `zero` none, too."""
        value = self.whole(key)
        if not (0 if zero else 1) <= value < _LARGEST:
            self.refuse(key, "zero or a positive number" if zero else "a positive number")
        return value

    def number(self, key: str) -> float:
        """A number."""
        value = self.values.get(key)
        if type(value) is float or (type(value) is int and abs(value) < 2**53):
            return float(value)
        self.refuse(key, "a number")

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self.values.get(key)
        return value if isinstance(value, bool) else self.refuse(key, "true or false")

    def text(self, key: str) -> str:
        """A text."""
        value = self.values.get(key)
        return value if isinstance(value, str) else self.refuse(key, "a text")

    def texts(self, key: str) -> list[str]:
        """A list of texts; a text alone is a list of one, and null is empty."""
        value = self.values.get(key)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.refuse(key, "a list of texts")
        return value

    def wholes(self, key: str) -> list[int] | None:
        """A list of whole numbers; a number alone is a list of one; None for null."""
        value = self.values.get(key)
        value = [value] if type(value) is int else value
        if value is not None and not (
            isinstance(value, list) and all(type(one) is int for one in value)
        ):
            self.refuse(key, "a list of whole numbers")
        return value

    def pattern(self, key: str) -> dict[str, Any]:
        """Numbers by regular expressions that end the names of modules."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict) or not all(type(v) in (int, float) for v in value.values()):
            self.refuse(key, "numbers by names of modules")
        return value
