"""Templates of sources, targets and segments: jinja2, sandboxed, strict, with a closed list of
filters.

The filters are those of CrossFit's preparation scripts (INK-USC/CrossFit, 2022-04-27). A template
sees the fields of one row and nothing else; an unknown filter or field is an error when the record
is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateAssertionError, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError

__all__ = ["FILTERS", "render", "variables"]

_SPACES = re.compile(" +")
_NO_FILTER = re.compile(r"No filter named '(.+?)'")


def _newlines_to_spaces(text: str) -> str:
    return text.replace("\n", " ")


def _clean(text: str) -> str:
    text = text.strip()
    for character in ("\n", "\\n", "\r", "\t"):
        text = text.replace(character, " ")
    return _SPACES.sub(" ", text)


def _join(items: Iterable[Any]) -> str:
    return " ".join(str(item) for item in items)


def _literal_newlines_to_spaces(text: str) -> str:
    return text.replace("\\n", " ")


def _squash(text: str) -> str:
    return text.replace(" ", "").lower()


def _choices(options: Iterable[Any]) -> str:
    return "".join(f" ({chr(ord('A') + index)}) {option}" for index, option in enumerate(options))


def _nearest(value: Any, step: float) -> str:
    # T5 (arXiv:1910.10683, section 2.4) writes the scores of STS-B as multiples of 0.2 with one
    # digit.
    return f"{round(float(value) / step) * step:.1f}"


FILTERS: Mapping[str, Callable[..., str]] = {
    "strip": str.strip,
    "nl": _newlines_to_spaces,
    "clean": _clean,
    "join": _join,
    "bs_n": _literal_newlines_to_spaces,
    "squash": _squash,
    "choices": _choices,
    "nearest": _nearest,
}
"""Filter name to function. `{{ text | clean }}` and so on; nothing of jinja2's own list is left."""


@functools.cache
def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters.clear()
    environment.filters.update(FILTERS)
    environment.globals.clear()
    return environment


@functools.cache
def _compiled(template: str) -> Template:
    try:
        return _environment().from_string(template)
    except TemplateAssertionError as error:
        found = _NO_FILTER.search(str(error))
        if found is None:
            raise ConfigurationError(
                f"The template {template!r} cannot be read: {error}"
            ) from error
        unknown = UnknownNameError("template filter", found.group(1), FILTERS)
        raise ConfigurationError(f"The template {template!r} cannot be read. {unknown}") from error
    except TemplateError as error:
        raise ConfigurationError(f"The template {template!r} cannot be read: {error}") from error


@functools.cache
def variables(template: str) -> frozenset[str]:
    """Returns the names of the fields that `template` asks for.

    Raises:
        ConfigurationError: the template cannot be parsed or names an unknown filter.
    """
    _compiled(template)
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


def render(template: str, fields: Mapping[str, Any], where: str) -> str:
    """Fills `template` with the `fields` of one row.

    Args:
        template: jinja2 text.
        fields: field name to value.
        where: the row's place (file and line), for the message of an error.

    Raises:
        DataError: a field is missing or is not of the type that a filter needs.
    """
    try:
        return _compiled(template).render(fields)
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: the template {template!r} cannot be filled: {error}") from error
