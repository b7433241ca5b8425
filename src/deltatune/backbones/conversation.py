"""A conversation as token ids, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from deltatune.core.errors import ConfigurationError

__all__ = ["conversation_ids"]


def conversation_ids(
    turns: Sequence[tuple[str, str]], tokenizer: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids of all but the last turn, its opening included, and those of the last turn.

    The two, joined, are what the template makes of the whole conversation; an end token follows
    where the template writes none. transformers renders templates in a sandbox.

    Args:
        turns: (role, content) of each; the last one is the answer.
        tokenizer: with a chat template.

    Raises:
        ConfigurationError: the template refuses the conversation, or writes what came before
            differently once it is answered, so that no loss can fall on the answer alone.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        asked = _ids(tokenizer, messages[:-1], opened=True)
        whole = _ids(tokenizer, messages, opened=False)
    except TemplateError as error:
        raise ConfigurationError(
            f"The chat template of this tokenizer refuses the roles "
            f"{', '.join(role for role, _ in turns)}: {error}"
        ) from error
    if whole[: len(asked)] != asked:
        raise ConfigurationError(
            "The chat template of this tokenizer writes a conversation differently once it is "
            "answered, so that the answer's tokens cannot be told. Give `prompt` and `completion` "
            "instead of `messages`."
        )
    answer = whole[len(asked) :]
    end = tokenizer.eos_token_id
    return asked, answer if end is None or end in answer else (*answer, end)


def _ids(tokenizer: Any, messages: list[dict[str, str]], *, opened: bool) -> tuple[int, ...]:
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=opened, tokenize=True, return_dict=False
    )
    return tuple(found)
