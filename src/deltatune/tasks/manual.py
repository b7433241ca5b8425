"""Tasks as cloze: the manual templates and label words of LM-BFF and PET, for T5's sentinels.

`{sentence} It was {mask}.` with *terrible* and *great* becomes the input `... It was
<extra_id_0>.` and the answers `<extra_id_0> terrible` and `<extra_id_0> great`, the form in which
T5 was pretrained (Raffel et al. 2020, section 3.1.4); the words are ranked by their loss.
"""

from __future__ import annotations

import re

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.tasks.reference import manual_templates
from deltatune.tasks.task import Task

__all__ = ["MASK", "as_cloze"]

MASK = "<extra_id_0>"
_STYLES = ("manual", "no_template")
_FIELD = re.compile(r"\{(\w+)(?:\|(\w+))?\}")
# The answers of BoolQ, as the reference has them.
_TRUTH = {"no": "false", "yes": "true"}
# Marks of an encoder's input: T5 has none at the start, and parts stand one after the other.
_MARKS = {"{bos}": "", "{sep}": " ", "||": "", "{mask}": MASK}


def as_cloze(task: Task, wanted: str) -> Task:
    """Returns the task with a manual template and its label words.

    Args:
        task: a classification task of `reference/manual_templates.csv`.
        wanted: a style, "manual" or "no_template", with the number of the pattern if it is not the
            first: "manual:2".

    Raises:
        UnknownNameError: a style or a number that there is not.
        ConfigurationError: the task has no manual template.
    """
    style, _, number = wanted.partition(":")
    if style not in _STYLES:
        raise UnknownNameError("style of a template", style, _STYLES)
    found = {
        row["pattern_id"]: row
        for row in manual_templates()
        if row["table1_task_id"] == task.name
        and row["style"] == style
        and "{mask}" in row["template"]
    }
    if not found or task.kind != "classification":
        names = sorted({row["table1_task_id"] for row in manual_templates()} - {""})
        raise ConfigurationError(
            f"{task.name} has no template of the style {style!r}. Those that have are among "
            f"{', '.join(names)}."
        )
    if (number or "0") not in found:
        raise UnknownNameError(f"template of {task.name}", number, found)
    row = found[number or "0"]
    words = dict(pair.split("=") for pair in row["label_words"].split("|"))
    return Task(
        **{
            **task.model_dump(),
            "template": _template(row["template"]),
            "labels": tuple(f"{MASK} {words[_key(label, words, task)]}" for label in task.labels),
            "known_as": task.labels,
        }
    )


def _template(text: str) -> str:
    """A template of the reference as one of ours."""
    for mark, meaning in _MARKS.items():
        text = text.replace(mark, meaning)

    def field(found: re.Match[str]) -> str:
        name, made = found.groups()
        return f"{{{{ {name} | {made} }}}}" if made else f"{{{{ {name} }}}}"

    return " ".join(_FIELD.sub(field, text).split())


def _key(label: str, words: dict[str, str], task: Task) -> str:
    """What the reference calls a label of ours: spelling apart, the same word, or its truth."""
    spelled = {_letters(key): key for key in words}
    bare = _letters(label)
    found = next((name for name in (bare, _TRUTH.get(bare)) if name in spelled), None)
    if found is None:
        raise ConfigurationError(
            f"{task.name}: its template has words for {', '.join(words)}, none for {label!r}."
        )
    return spelled[found]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.casefold())
