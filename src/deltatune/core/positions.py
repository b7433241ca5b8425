"""Learned positions of a token stack: where they are kept, and where a text begins to count."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["first_position", "position_table"]

_NAMES = re.compile(r"position|wpe")


def position_table(stack: nn.Module) -> nn.Module | None:
    """The module that embeds positions; None where they are not learned."""
    named = stack.named_modules()
    return next((module for name, module in named if _NAMES.search(name.rpartition(".")[2])), None)


def first_position(table: nn.Module | None) -> int:
    """The position of a first token: after that of the padding, where a table keeps one for it."""
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
