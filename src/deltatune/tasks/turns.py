"""Conversations, as rows of a file have them: a list of turns with a role and a content."""

from __future__ import annotations

from typing import Any

from deltatune.core.errors import DataError, UnknownNameError

__all__ = ["ANSWERER", "ROLES", "TARGET", "TEMPLATE", "read_turns"]

ANSWERER = "assistant"
ROLES = ("system", "user", ANSWERER)

TEMPLATE = (
    "{% for turn in messages[:-1] %}{{ turn.role }}:\n{{ turn.content }}\n{% endfor %}"
    f"{ANSWERER}:\n"
)
"""The input of a conversation for what has no chat template."""

TARGET = "{{ messages[-1].content }}"


def read_turns(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Returns (role, content) of each turn.

    Raises DataError, with the place of the row, unless there are two turns or more, each with one
    of ROLES and a text, and the last one is the assistant's.
    """
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(
            f"{where}: a conversation is a list of two turns or more, found {_short(value)}."
        )
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise DataError(f"{where}: a turn has 'role' and 'content', found {_short(turn)}.")
        if turn["role"] not in ROLES:
            raise DataError(f"{where}: {UnknownNameError('role', str(turn['role']), ROLES)}")
        if not isinstance(turn["content"], str):
            raise DataError(f"{where}: a content is a text, found {_short(turn['content'])}.")
        turns.append((turn["role"], turn["content"]))
    if turns[-1][0] != ANSWERER:
        raise DataError(
            f"{where}: the last turn is the answer and must be of the {ANSWERER}, found "
            f"{turns[-1][0]!r}."
        )
    return tuple(turns)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
