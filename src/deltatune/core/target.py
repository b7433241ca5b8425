"""Targets: how a place of a model is named.

A target is a union of terms, `|` between them. A term is one of

- roles, every part of which must hold: `attention.q`, `cross_attention.v`, `encoder.attention.k`,
  `ffn.up`, `norm`, `embedding`, `head`;
- the same in some blocks, `encoder.block[-1].ffn.down`; `block[8:]` alone is every module in them;
  a bound may be a share of a stack's blocks, rounded down: `block[3/4:]`, the last quarter;
- a sublayer, `attention` or `ffn`: for an output face the span from its input to its output
  projection, else its projections;
- `residual`: the residual stream, at every block: its site is the block itself;
- `linear`: every linear module outside of heads; `block.linear`: those in blocks;
- module names, whole, by their last parts, or a glob on the whole name: `q_proj`,
  `*.layers.0.mlp.*`;
- `re:.*(q|v)_proj`, a regular expression on the whole name; it must be the last term;
- `type:LlamaMLP`, the class of a module.

In Python a compiled pattern, a class or a predicate `(name, module) -> bool` becomes such a text
through `where(...)`. A target that matches nothing is an error that names what is near.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from deltatune.core.errors import TargetError, nearest
from deltatune.core.method import Face
from deltatune.core.roles import block_path, places
from deltatune.core.site import ATTENTIONS, Place, Site
from deltatune.core.storage import storage_of
from deltatune.core.untrusted import Pattern

__all__ = ["ROLE_WORDS", "Role", "find_places", "find_sites", "named", "site_at", "terms", "where"]

Test = Callable[[str, nn.Module], bool]

_STACKS = ("encoder", "decoder")
_SUBLAYERS = ("attention", *ATTENTIONS, "ffn")
_PARTS = (
    "q",
    "k",
    "v",
    "output",
    "up",
    "gate",
    "down",
    "norm",
    "embedding",
    "head",
    "pooler",
    "relative",
    "experts",
    "residual",
    "linear",
)
ROLE_WORDS = (*_STACKS, "block", *_SUBLAYERS, *_PARTS)
_NUMBER = r"(-?\d+(/[1-9]\d*)?)?"
_BLOCK = re.compile(rf"block(\[(?P<index>-?\d+|{_NUMBER}:{_NUMBER}(:-?[1-9]\d*)?)\])?")


@dataclass(frozen=True)
class Role:
    """A term in the language of roles; None where it says nothing."""

    stack: str | None = None
    block: str | None = None
    sublayer: str | None = None
    part: str | None = None

    @classmethod
    def parse(cls, term: str) -> Role | None:
        """Reads a term; None if it is not written in roles."""
        found: dict[str, str] = {}
        for word in term.split("."):
            block = _BLOCK.fullmatch(word)
            kinds = (("stack", _STACKS), ("sublayer", _SUBLAYERS), ("part", _PARTS))
            key = "block" if block else next((k for k, words in kinds if word in words), None)
            if key is None or key in found:
                return None
            found[key] = (block.group("index") or ":") if block else word
        return cls(**found)

    def blocks(self, count: int) -> set[int]:
        """The blocks it names among `count`."""
        assert self.block is not None
        bounds = [_bound(b, count) if b else None for b in self.block.split(":")]
        every = range(count)
        if len(bounds) == 1:
            index = int(self.block)
            return {every[index]} if -count <= index < count else set()
        return set(every[slice(*bounds)])

    def holds(self, place: Place, counts: dict[str, int]) -> bool:
        """Whether a place is what the term says, the part `linear` aside."""
        if self.stack is not None and place.stack != self.stack:
            return False
        if self.block is not None and (
            place.block is None or place.block not in self.blocks(counts[place.stack])
        ):
            return False
        if self.sublayer == "attention" and place.sublayer not in ATTENTIONS:
            return False
        if self.sublayer not in (None, "attention", place.sublayer):
            return False
        return self.part in (None, "linear", place.part)


def _bound(text: str, count: int) -> int:
    """A bound of a slice of `count` blocks: a number, or a share of them."""
    over, _, under = text.partition("/")
    return int(over) * count // int(under) if under else int(over)


def terms(target: str) -> tuple[str, ...]:
    """The terms of a target. A regular expression keeps its own bars: it must be the last term.

    Raises TargetError if there is none.
    """
    head, mark, tail = target.partition("re:")
    found = [term.strip() for term in head.split("|") if term.strip()]
    if not found and not mark:
        raise TargetError(f"The target {target!r} names nothing. Give a role, as in 'attention.q'.")
    return (*found, mark + tail.strip()) if mark else tuple(found)


def find_places(model: nn.Module, target: str) -> tuple[Place, ...]:
    """The places that the roles of `target` name. Raises TargetError where one names none."""
    known = places(model)
    found: dict[Place, None] = {}
    for term in terms(target):
        role = Role.parse(term)
        matched = [] if role is None else [p for p in known if role.holds(p, _counts(known))]
        if not matched:
            raise _nothing(model, term, known)
        found |= dict.fromkeys(matched)
    return tuple(found)


def find_sites(model: nn.Module, target: str, face: Face) -> tuple[Site, ...]:
    """The sites of a target for a face that acts at modules, in the order of the model.

    Raises TargetError if a term matches nothing.
    """
    known = places(model)
    found: dict[str, Site] = {}
    for term in terms(target):
        role = Role.parse(term)
        sites = list(
            _by_name(model, term, known) if role is None else _by_role(model, role, known, face)
        )
        if not sites:
            raise _nothing(model, term, known)
        for site in sites:
            found.setdefault(site.name, site)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(found.values(), key=lambda site: (order[site.path], site.rows or (0, 0))))


def _counts(known: Iterable[Place]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for place in known:
        if place.block is not None:
            counts[place.stack] = max(counts.get(place.stack, 0), place.block + 1)
    return counts


def _by_role(model: nn.Module, role: Role, known: Sequence[Place], face: Face) -> Iterator[Site]:
    counts = _counts(known)
    matched = [place for place in known if role.holds(place, counts)]
    if role.part == "residual":
        inside = replace(role, part=None)
        yield from _residual(model, [p for p in known if inside.holds(p, counts)])
    elif role.sublayer is not None and role.part is None and face == "output":
        yield from _spans(model, matched)
    elif role.part is None and role.sublayer is None and role.block is not None:
        yield from _whole_blocks(model, matched, face)
    else:
        yield from _modules(model, role, matched, face)


def _modules(model: nn.Module, role: Role, matched: Sequence[Place], face: Face) -> Iterator[Site]:
    shares: dict[str, int] = {}
    for place in matched:
        shares[place.module] = shares.get(place.module, 0) + 1
    for place in matched:
        module = model.get_submodule(place.module)
        linear = storage_of(module).linear
        if role.part == "linear" and (not linear or place.part == "head"):
            continue
        if role.part is None and face == "weight" and not linear:
            continue
        if face == "select" and place.share is not None:
            if shares[place.module] < place.share[1]:
                raise TargetError(
                    f"{place.module} fuses {place.share[1]} projections; its parameters cannot be "
                    f"selected for {place.part} alone. Select all of them, or use a weight method "
                    "such as lora."
                )
            place = replace(place, share=None)
        yield site_at(module, place.module, place)


def site_at(module: nn.Module, path: str, place: Place | None) -> Site:
    """The site of one module, or of its slice if it is fused."""
    inputs, outputs = storage_of(module).widths(module)
    if place is None or place.share is None:
        return Site(path, module, path, inputs, outputs, place)
    index, parts = place.share
    width = outputs // parts
    rows = (index * width, (index + 1) * width)
    return Site(f"{path}[{place.part}]", module, path, inputs, width, place, rows=rows)


def _spans(model: nn.Module, matched: Sequence[Place]) -> Iterator[Site]:
    sublayers = {(p.stack, p.block, p.sublayer): p for p in matched if p.sublayer}
    for key, example in sublayers.items():
        name = example.role.rsplit(".", 1)[0]
        own: dict[str, Place] = {}
        for place in matched:
            if (place.stack, place.block, place.sublayer) == key:
                own.setdefault(place.part, place)  # the first that reads, of several
        if "experts" in own:
            place = own["experts"]
            module = model.get_submodule(place.module)
            width = next(p.shape[-1] for p in module.parameters() if p.dim() == 2)  # its router's
            yield Site(name, module, place.module, width, width, replace(place, part=""))
            continue
        first = own.get("q") or own.get("up") or own.get("gate")
        last = own.get("output") or own.get("down")
        if first is None or last is None:
            continue
        enter, leave = model.get_submodule(first.module), model.get_submodule(last.module)
        inputs, outputs = storage_of(enter).widths(enter)[0], storage_of(leave).widths(leave)[1]
        place = Place(last.module, last.stack, last.block, last.sublayer, "")
        yield Site(name, leave, last.module, inputs, outputs, place, entry=(first.module, enter))


def _residual(model: nn.Module, matched: Sequence[Place]) -> Iterator[Site]:
    """The blocks, as wide as what their first projections read."""
    widths: dict[str, int] = {}
    for place in matched:
        if place.block is not None and place.part in ("q", "up", "gate"):
            path = block_path(place)
            if path not in widths:
                module = model.get_submodule(place.module)
                widths[path] = width = storage_of(module).widths(module)[0]
                here = Place(path, place.stack, place.block, None, "residual")
                yield Site(here.role, model.get_submodule(path), path, width, width, here)


def _whole_blocks(model: nn.Module, matched: Sequence[Place], face: Face) -> Iterator[Site]:
    known = {place.module: place for place in matched if place.share is None}
    prefixes = dict.fromkeys(
        (place.stack, place.block, block_path(place))
        for place in matched
        if place.block is not None
    )
    for stack, block, prefix in prefixes:
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if any(p is not None for p in module._parameters.values()):
                if face == "weight" and not storage_of(module).linear:
                    continue
                place = known.get(name) or Place(name, stack, block, None, "")
                yield site_at(module, name, place)


def named(model: nn.Module, term: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a term names without roles. Raises TargetError for a broken pattern."""
    test = _test(term)
    for name, module in model.named_modules():
        if name and test(name, module):
            yield name, module


def _test(term: str) -> Test:
    if term.startswith("type:"):
        return lambda _, module: any(kind.__name__ == term[5:] for kind in type(module).__mro__)
    if term.startswith("re:"):
        return _matching(term)
    if any(mark in term for mark in "*?["):
        return lambda name, _: fnmatch.fnmatchcase(name, term)
    return lambda name, _: name == term or name.endswith("." + term)


def _matching(term: str) -> Test:
    try:
        pattern = Pattern(term[3:])
    except ValueError as error:
        raise TargetError(f"{term!r} is not a regular expression: {error}. Correct it.") from None

    def test(name: str, _: nn.Module) -> bool:
        try:
            return pattern.match(name) is not None
        except ValueError as error:
            raise TargetError(f"{term!r} cannot be asked: {error}. Write a simpler one.") from None

    return test


def where(test: re.Pattern[str] | type[nn.Module] | Test, model: nn.Module | None = None) -> str:
    """The target that a pattern, a class or a predicate means, as text, so that it can be saved.

    Args:
        test: a compiled pattern for whole names, a class of modules, or `(name, module) -> bool`.
        model: where a predicate is asked; the target then names the modules it found there.

    Raises TargetError for a predicate without a model, or one that finds nothing.
    """
    if isinstance(test, re.Pattern):
        flags = "".join(letter for letter in "aimsx" if test.flags & re.RegexFlag[letter.upper()])
        return f"re:(?{flags}){test.pattern}" if flags else f"re:{test.pattern}"
    if isinstance(test, type):
        return f"type:{test.__name__}"
    found = [] if model is None else [n for n, m in model.named_modules() if n and test(n, m)]
    if not found:
        raise TargetError(
            "A predicate must be asked of a model, and find a module there; this one found none."
        )
    return "re:" + "|".join(map(re.escape, found))


def _by_name(model: nn.Module, term: str, known: Sequence[Place]) -> Iterator[Site]:
    by_module = {place.module: place for place in known if place.share is None}
    for name, module in named(model, term):
        yield site_at(module, name, by_module.get(name))


def _nothing(model: nn.Module, term: str, known: Sequence[Place]) -> TargetError:
    roles = {".".join(t for t in (p.sublayer, p.part) if t) for p in known}
    lasts = {
        name.rsplit(".", 1)[-1]
        for name, m in model.named_modules()
        if name and not list(m.children())
    }
    # A word of the language of roles is no slip of the pen: what it names is not here.
    words = set() if Role.parse(term) else set(ROLE_WORDS)
    close = nearest(term, roles | lasts | words)
    hint = f"Nearest here: {', '.join(close)}. " if close else ""
    return TargetError(
        f"The target {term!r} matches nothing in {type(model).__name__}. {hint}"
        f"Roles here: {', '.join(sorted(roles))}. Module names end in: {', '.join(sorted(lasts))}. "
        "Every linear module outside of heads is 'linear'."
    )
