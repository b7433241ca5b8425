"""Mixers: methods that weigh other methods, their members, by what a site reads.

At a site where members c_1 .. c_n act, each on what is there without any of them,

    y' = y + Σ_k w_k(x) (c_k(x, y) - y),

so that every face is weighed by its effect, and a weight of one is the member alone. Of keys and
values that join an attention, w multiplies the share that each query gives them: w = 0 is the
attention without them, w = 1 with them as they are.

A mixer defines `init` and `mix`. In an expression it stands in front of its members:
`route(lora(rank=4), pfeiffer, chosen=1)`. What is mixed reads x, so nothing of it can be merged.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.method import Leaves, Method

if TYPE_CHECKING:
    from deltatune.core.grammar import Expression
    from deltatune.core.text import Text

__all__ = ["Mixer", "check_mixers", "terms"]


@dataclass(frozen=True, kw_only=True)
class Mixer(Method):
    """The base of every mixer.

    Attributes:
        frozen: whether its members stay as they begin, or as they were loaded (`start_from`).
        members: how many of the methods behind it in an expression it weighs; `over` sets it.
    """

    frozen: bool = False
    members: int = 0

    default_at: ClassVar[str] = ""  #: its sites are those of its members
    foresees: ClassVar[bool] = False  #: whether it reads a first pass without the delta
    compares: ClassVar[bool] = False  #: whether it needs what members make of a site (z)

    def over(self, *members: str | Method | Expression) -> Expression:
        """The expression in which this weighs `members`, one method each.

        Raises ConfigurationError for none, for sums and stages, and for a mixer among them.
        """
        from deltatune.core.grammar import Expression

        found = [Expression.of(member) for member in members]
        for one in found:
            if len(one.methods) != 1 and not isinstance(one.methods[0], Mixer):
                raise ConfigurationError(
                    f"{self.name} weighs methods one by one, and {str(one)!r} is "
                    f"{'made of stages' if one.stages else 'a sum'}. Separate them by commas: "
                    f"{self.name}({', '.join(map(str, one))})."
                )
        methods = tuple(one.methods[0] for one in found)
        return Expression((replace(self, members=len(methods)), *methods))

    @abc.abstractmethod
    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        """See `Method.mix`."""


def terms(methods: Sequence[Method]) -> Iterator[tuple[Method, tuple[Method, ...]]]:
    """The outermost methods of an expression, mixers with their members."""
    place = 0
    while place < len(methods):
        method = methods[place]
        size = method.members if isinstance(method, Mixer) else 0
        yield method, tuple(methods[place + 1 : place + 1 + size])
        place += 1 + size


def check_mixers(methods: Sequence[Method]) -> None:
    """Raises ConfigurationError for a mixer without what it can weigh."""
    for method, members in terms(methods):
        if not isinstance(method, Mixer):
            continue
        name = method.name
        if method.at is not None:
            raise ConfigurationError(
                f"{name} acts where its members act. Give `at` to these: {name}(lora(at='linear'))."
            )
        if not members or len(members) < method.members:
            raise ConfigurationError(
                f"{name} weighs other methods; found none. Write {name}(lora(rank=8), pfeiffer)."
            )
        for member in members:
            if isinstance(member, Mixer):
                raise ConfigurationError(
                    f"{member.name} within {name}: a mixer weighs methods, not mixers. Add them."
                )
            if member.face == "embed" or member.category in ("control", "head") or member.at_input:
                raise ConfigurationError(
                    f"{name} cannot weigh {member.name}, which "
                    + ("acts before" if member.at_input else "is no change to what")
                    + " a site computes. Put it beside: "
                    f"{name}(...) + {member.name}."
                )
            if member.face == "attend" and method.compares:
                raise ConfigurationError(
                    f"{name} weighs by what its members make of a site, and {member.name}, which "
                    "gives keys and values, makes nothing of it by itself. Use gate or route."
                )
            if member.face == "attend" and method.strength != 1:
                raise ConfigurationError(
                    f"{name} weighs {member.name}, which gives keys and values, by the share that "
                    f"an attention gives them, and takes it at the strength 1; it is "
                    f"{method.strength}."
                )
