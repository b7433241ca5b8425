"""What an expression may name besides methods: expressions with a name, and what is not there.

Both carry a text in the form of a method's docstring: title, formula and paper are read from it
(`core.card`).
"""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import NAMES, Category, ReviewCategory
from deltatune.core.registry import Registry

__all__ = ["ABSENT", "PRESETS", "Absent", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An expression with a name.

    Attributes:
        expression: what the name stands for.
        text: title, formula and paper, in the form of a method's docstring.
        aliases: other names of it.
    """

    expression: str
    text: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A method of the literature that does not work here.

    Attributes:
        reason: why, as a sentence without its full stop.
        nearest: the expression that comes nearest to it.
        text, category, review_category, count: as those of a method.
    """

    reason: str
    nearest: str
    text: str
    category: Category
    review_category: ReviewCategory
    count: str

    def error(self, name: str) -> ConfigurationError:
        """What is raised where an expression names it."""
        return ConfigurationError(
            f"{name} does not work here: {self.reason}. Nearest to it: {self.nearest!r}."
        )


PRESETS: Registry[Preset] = Registry("preset", source="deltatune.catalogue", names=NAMES)
ABSENT: Registry[Absent] = Registry("method that is not there", names=NAMES)
