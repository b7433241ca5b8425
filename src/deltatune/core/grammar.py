"""The grammar of methods: one strict text for Python, YAML and the shell.

    stages     := expression (">>" expression)*
    expression := term (("+" | "-") term)*
    term       := [number "*"] method | [number "*"] "(" expression ")"
    method     := name | name "(" [argument ("," argument)*] ")"
    argument   := field "=" literal         a number, a quoted string, True, False, None
                | term                      of a mixer: what it weighs, before the fields

A name is that of a method, one of its aliases, or a preset: an expression with a name, in whose
place its methods are read. What is written has the methods' own names.

`lora(rank=4, at='attention.q') + bitfit` and `parse(str(expression)) == expression` for every
expression. It is a subset of Python's own expressions, so Python's parser reads it; nothing is
evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.method import METHODS, Method
from deltatune.core.mixer import Mixer, check_mixers, terms
from deltatune.core.presets import ABSENT, PRESETS

__all__ = ["Expression", "build", "parse", "render", "split_methods"]

_UNNAMED = ("strength", "members")  # written in front of a method, and behind its name


@dataclass(frozen=True)
class Expression:
    """One method, or several that act at the same time.

    Attributes:
        methods: in the order in which they are attached; a mixer is followed by its members.
        stages: how many of them are trained in each stage, where they are trained one after the
            other; empty where all are trained at once. A head is trained in every stage.
    """

    methods: tuple[Method, ...]
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_mixers(self.methods)

    @classmethod
    def of(cls, value: str | Method | Expression) -> Expression:
        """The expression that `value` is, names or writes."""
        if isinstance(value, Expression):
            return value
        if isinstance(value, Method):
            return cls((value,))
        if isinstance(value, str):
            return parse(value)
        raise ConfigurationError(
            "A method is a value like LoRA(rank=8) or a text like 'lora(rank=8)'; found "
            f"{type(value).__name__}."
        )

    def at(self, target: str | None) -> Expression:
        """The same with `target` for every method that names none, controls and heads aside."""
        if target is None:
            return self
        return self._with(
            method
            if method.at is not None or _knows_its_place(method)
            else dataclasses.replace(method, at=target)
            for method in self.methods
        )

    @property
    def in_place(self) -> bool:
        """Whether it trains the backbone itself."""
        return any(method.in_place for method in self.methods)

    def without_slot_fields(self) -> Expression:
        """The same with what may differ between the slots of one bank at its default."""
        return self._with(map(_without_slot_fields, self.methods))

    def stage_of(self, place: int) -> int | None:
        """The stage in which a method is trained, counted from 0; None for all stages."""
        if not self.stages or self.methods[place].category == "head":
            return None
        ends = itertools.accumulate(self.stages)
        return next(stage for stage, end in enumerate(ends) if place < end)

    def of_stage(self, stage: int) -> tuple[Method, ...]:
        """The methods that are trained in a stage, heads aside."""
        return tuple(m for k, m in enumerate(self.methods) if self.stage_of(k) == stage)

    def _with(self, methods: Iterable[Method]) -> Expression:
        """The same stages of other methods."""
        return Expression(tuple(methods), self.stages)

    def __add__(self, other: str | Method | Expression) -> Expression:
        other = Expression.of(other)
        if not self.stages and not other.stages:
            return Expression(self.methods + other.methods)
        if other.stages or any(method.category != "head" for method in other):
            raise ConfigurationError(
                f"({self}) + ({other}) does not say when the sum is trained. Add within a stage: "
                "a >> (b + c)."
            )
        last = self.stages[-1] + len(other.methods)
        return Expression(self.methods + other.methods, (*self.stages[:-1], last))

    def __rshift__(self, other: str | Method | Expression) -> Expression:
        other = Expression.of(other)
        both = (one.stages or (len(one.methods),) for one in (self, other))
        return Expression(self.methods + other.methods, tuple(itertools.chain(*both)))

    def __sub__(self, other: str | Method | Expression) -> Expression:
        return self + -1.0 * Expression.of(other)

    def __mul__(self, strength: float) -> Expression:
        outer = ((strength * method, *members) for method, members in terms(self.methods))
        return self._with(itertools.chain(*outer))

    __rmul__ = __mul__

    def __neg__(self) -> Expression:
        return -1.0 * self

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __str__(self) -> str:
        methods = iter(self.methods)
        sizes = self.stages or (len(self.methods),)
        stages = [terms(tuple(itertools.islice(methods, size))) for size in sizes]
        return " >> ".join(" + ".join(render(*term) for term in stage) for stage in stages)


def _knows_its_place(method: Method) -> bool:
    return method.category in ("control", "head") or isinstance(method, Mixer)


def _without_slot_fields(method: Method) -> Method:
    fields = {field.name: field.default for field in dataclasses.fields(method)}
    kept: dict[str, Any] = {name: fields[name] for name in method.slot_fields}
    return dataclasses.replace(method, **kept)


def render(method: Method, members: Iterable[Method] = ()) -> str:
    """The text of a method: its strength, its name, the members that it weighs and the fields that
    differ from their defaults.
    """
    changed = [render(member) for member in members]
    changed += [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in dataclasses.fields(method)
        if getattr(method, f.name) != f.default and f.name not in _UNNAMED
    ]
    text = f"{method.name}({', '.join(changed)})" if changed else method.name
    return text if method.strength == 1 else f"{method.strength!r} * {text}"


def build(name: str, arguments: Mapping[str, Any]) -> Method:
    """The method called `name` with these fields. Raises UnknownNameError, ConfigurationError."""
    method = METHODS[name]
    name = method.name
    fields = {f.name for f in dataclasses.fields(method)} - {"members"}
    for key in arguments:
        if key not in fields:
            raise UnknownNameError(f"argument of {name}", key, fields)
    return method(**arguments)


def parse(text: str) -> Expression:
    """Reads an expression. Raises ConfigurationError with the place where the text goes wrong."""
    stages = [tuple(_methods(one, text)) for one in _stages(_tree(text, text.strip()))]
    methods = tuple(itertools.chain(*stages))
    return Expression(methods, tuple(map(len, stages)) if len(stages) > 1 else ())


def split_methods(text: str) -> tuple[str, ...]:
    """Cuts a list of expressions at its commas, those within parentheses and quotes excepted."""
    if not text.strip():
        return ()
    source = f"({text.strip()},)" if not text.strip().endswith(",") else f"({text.strip()})"
    tree = _tree(text, source)
    assert isinstance(tree, ast.Tuple)
    return tuple(ast.get_source_segment(source, item) or "" for item in tree.elts)


def _tree(text: str, source: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            # Patterns are written with backslashes, of which Python knows some only.
            warnings.simplefilter("ignore")
            return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        offset = getattr(error, "offset", None)
        place = f" near position {offset}" if offset else ""
        raise ConfigurationError(
            f"Cannot read the method {text!r}{place}. Write name(field=value, ...) + name(...), "
            "with text values in quotes: lora(rank=8, at='attention.q')."
        ) from None


def _stages(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            yield from _stages(left)
            yield from _stages(right)
        case _:
            yield node


def _methods(node: ast.expr, text: str) -> Iterator[Method]:
    match node:
        case ast.BinOp(op=ast.RShift()):
            raise ConfigurationError(
                f"In {text!r} a '>>' stands within a sum or a product. Stages are outermost: "
                "a >> (b + c) >> d."
            )
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from _methods(left, text)
            yield from _methods(right, text)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            yield from _methods(left, text)
            yield from -Expression(tuple(_methods(right, text)))
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if (s := _number(left)) is not None:
            yield from s * Expression(tuple(_methods(right, text)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield from -Expression(tuple(_methods(operand, text)))
        case ast.Name(id=name):
            yield from _named(name, {})
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            yield from _named(name, _arguments(keywords, text))
        case ast.Call(func=ast.Name(id=name), args=members, keywords=keywords) if (
            name in METHODS and issubclass(METHODS[name], Mixer)
        ):
            mixer = build(name, _arguments(keywords, text))
            assert isinstance(mixer, Mixer)
            within = [Expression(tuple(_methods(member, text))) for member in members]
            yield from mixer.over(*within)
        case _:
            raise ConfigurationError(
                f"{ast.unparse(node)!r} in {text!r} is not a method. Write name or "
                "name(field=value, ...), joined by '+', with a number and '*' before it if it is "
                "to be weaker or stronger; every argument is named."
            )


def _number(node: ast.expr) -> float | None:
    """The number that a node writes, with its sign; None for anything else."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            found = _number(operand)
            return None if found is None else -found
        case ast.Constant(value=int(value) | float(value)) if not isinstance(value, bool):
            return float(value)
    return None


def _named(name: str, arguments: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods that a name stands for: one, or those of a preset."""
    if name in ABSENT:
        raise ABSENT[name].error(name)
    if name not in PRESETS:
        return (build(name, arguments),)
    expression = PRESETS[name].expression
    if arguments:
        raise ConfigurationError(
            f"{name} is a preset, a name for {expression!r}, and takes no arguments. Write that "
            "expression with the values that you want."
        )
    return parse(expression).methods


def _arguments(keywords: list[ast.keyword], text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keyword in keywords:
        name, value = _argument(keyword, text)
        if name in found:
            raise ConfigurationError(f"{name} is given twice in {text!r}. Give it once.")
        found[name] = value
    return found


def _argument(keyword: ast.keyword, text: str) -> tuple[str, Any]:
    try:
        if keyword.arg is None:
            raise ValueError
        return keyword.arg, ast.literal_eval(keyword.value)
    except ValueError:
        raise ConfigurationError(
            f"The value of {keyword.arg or '**'} in {text!r} must be a number, a quoted text, "
            f"True, False or None; found {ast.unparse(keyword.value)!r}."
        ) from None
