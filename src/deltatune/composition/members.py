"""Members: the trained deltas that a composition takes, each a slot of an attached delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from torch import nn

from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError

__all__ = ["Member", "Source", "members_of", "model_of", "resting"]

Source: TypeAlias = "Delta | tuple[Delta, int]"
Member: TypeAlias = tuple[Delta, int]


def members_of(sources: Sequence[Source]) -> list[Member]:
    """(delta, slot) for each source; a delta alone means its slot 0.

    Raises ConfigurationError for no source, or a slot that is not there.
    """
    found = [(one, 0) if isinstance(one, Delta) else one for one in sources]
    if not found:
        raise ConfigurationError("A composition needs at least one delta; none was given.")
    for delta, slot in found:
        delta.check_slot(slot)
    return found


def model_of(members: Sequence[Member]) -> nn.Module:
    """The model of all members. Raises ConfigurationError if there are several."""
    model = members[0][0].model
    if any(delta.model is not model for delta, _ in members):
        raise ConfigurationError(
            "The deltas belong to different models. Load all of them onto one, which verifies that "
            "they were made for it."
        )
    return model


@contextmanager
def resting(members: Sequence[Member]) -> Iterator[None]:
    """Within it the members do not act, so that what is made of them is measured alone.

    Raises StateError where one is merged.
    """
    with ExitStack() as stack:
        for delta in dict.fromkeys(delta for delta, _ in members):
            if delta.attached:
                stack.enter_context(delta.active(False))
        yield
