"""Templates of sources, targets and segments: jinja2, sandboxed, strict, with a closed list of
filters.

The filters (`deltatune.tasks.filters`) are those of CrossFit's preparation scripts
(INK-USC/CrossFit, 2022-04-27), and a few that take the place of its code. A template sees the
fields of one row and nothing else; an unknown filter or field is an error when the record is read.
An expression is what stands between the braces of a template; it gives a value rather than text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateAssertionError,
    TemplateError,
    Undefined,
    meta,
)
from jinja2.environment import TemplateExpression
from jinja2.sandbox import SandboxedEnvironment

from deltatune.core.errors import ConfigurationError, DataError, UnknownNameError
from deltatune.tasks.filters import FILTERS

__all__ = ["evaluate", "render", "variables", "variables_of_expression"]

_T = TypeVar("_T")

_NO_FILTER = re.compile(r"No filter named '(.+?)'")


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
    return _read(template, _environment().from_string)


@functools.cache
def _expression(expression: str) -> TemplateExpression:
    return _read(
        expression, lambda text: _environment().compile_expression(text, undefined_to_none=False)
    )


def _read(text: str, compile_it: Callable[[str], _T]) -> _T:
    try:
        return compile_it(text)
    except TemplateAssertionError as error:
        found = _NO_FILTER.search(str(error))
        if found is None:
            raise ConfigurationError(f"The template {text!r} cannot be read: {error}") from error
        unknown = UnknownNameError("template filter", found.group(1), FILTERS)
        raise ConfigurationError(f"The template {text!r} cannot be read. {unknown}") from error
    except TemplateError as error:
        raise ConfigurationError(f"The template {text!r} cannot be read: {error}") from error


@functools.cache
def variables(template: str) -> frozenset[str]:
    """Returns the names of the fields that `template` asks for.

    Raises:
        ConfigurationError: the template cannot be parsed or names an unknown filter.
    """
    _compiled(template)
    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


@functools.cache
def variables_of_expression(expression: str) -> frozenset[str]:
    """Returns the names of the fields that `expression` asks for; see `variables`."""
    _expression(expression)
    return variables(f"{{{{ {expression} }}}}")


def render(template: str, fields: Mapping[str, Any], where: str) -> str:
    """Fills `template` with the `fields` of one row.

    Args:
        template: jinja2 text.
        fields: field name to value.
        where: the row's place (file and line), for the message of an error.

    Raises:
        DataError: a field is missing or is not of the type that a filter needs.
    """
    compiled = _compiled(template)
    return _filled(template, lambda: compiled.render(fields), where)


def evaluate(expression: str, fields: Mapping[str, Any], where: str) -> Any:
    """Returns the value of `expression` for the `fields` of one row; else as `render`."""
    compiled = _expression(expression)
    value = _filled(expression, lambda: compiled(fields), where)
    if isinstance(value, Undefined):
        raise DataError(f"{where}: the expression {expression!r} asks for what is not there.")
    return value


def _filled(text: str, fill: Callable[[], _T], where: str) -> _T:
    try:
        return fill()
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise DataError(f"{where}: the template {text!r} cannot be filled: {error}") from error
