"""What the paper says that an experiment shows, beside what is found here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deltatune.study.section import Column, Section, Table
from deltatune.study.summary import Summary

__all__ = ["Claim", "Found", "Look", "everywhere", "held_to"]

Summaries: TypeAlias = Mapping[str, Summary]


@dataclass(frozen=True)
class Found:
    """What is found here.

    Attributes:
        here: the numbers, in a sentence.
        agrees: whether they say what the paper does.
    """

    here: str
    agrees: bool


Look: TypeAlias = Callable[[Summaries], Mapping[str, Found]]


@dataclass(frozen=True)
class Claim:
    """Something that the paper says an experiment shows.

    Attributes:
        says: in its words, or nearly.
        look: where in the parts of a study (a backbone, a part of it, an arm) -> what is found
            there. What cannot be said of these arms and tasks is left out.
    """

    says: str
    look: Look


def everywhere(look: Callable[[Summary, str], Found | None], *, but: str | None = None) -> Look:
    """Looks at each backbone of each part.

    Args:
        look: (part, backbone) -> what is found; None where nothing can be said.
        but: a part that is not looked at.
    """

    def found(summaries: Summaries) -> dict[str, Found]:
        places = {
            ", ".join(filter(None, (backbone, name))): look(summary, backbone)
            for name, summary in summaries.items()
            if name != but
            for backbone in summary.comparison.backbones
        }
        return {where: one for where, one in places.items() if one is not None}

    return found


def held_to(claims: Sequence[Claim], summaries: Summaries) -> list[Section]:
    """The section that says of each claim whether it holds here; none where nothing can be said."""
    rows = tuple(
        (claim.says, where, found.here, "yes" if found.agrees else "no")
        for claim in claims
        for where, found in claim.look(summaries).items()
    )
    if not rows:
        return []
    columns = (Column("the paper"), Column("where"), Column("here"), Column("agrees"))
    note = (
        "Yes where the numbers beside it say so: the same order, the sign of a mean, more than "
        "half where the paper says most. None of it is a test of significance."
    )
    table = Table("Claim by claim", columns, rows, note=note)
    return [Section("What the paper finds, and what is found here", parts=(table,))]
