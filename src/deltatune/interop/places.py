"""Which modules a configuration of PEFT names, and how a target names the same ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from deltatune.core.errors import ArtefactError, TargetError
from deltatune.core.method import Face
from deltatune.core.target import Role, find_sites
from deltatune.core.untrusted import Pattern
from deltatune.interop.configuration import Configuration

__all__ = ["adapted", "ends", "matching", "saved", "target_of", "valued"]

_MARKS = set("*?[|: ")


def matching(pattern: str, text: str, where: str, *, whole: bool = True) -> re.Match[str] | None:
    """What a regular expression of a configuration matches; None for nothing.

    Raises ArtefactError for a broken one, and one that takes too long.
    """
    try:
        return Pattern(pattern).match(text, whole=whole)
    except ValueError as error:
        raise ArtefactError(f"{where}: {error}.") from None


def ends(name: str, keys: Collection[str]) -> bool:
    """Whether a module has one of these names, or one that ends in it behind a dot."""
    return any(name == key or name.endswith(f".{key}") for key in keys)


def adapted(model: nn.Module, configuration: Configuration) -> list[str]:
    """The modules that `target_modules` and what narrows it name, by the rules of PEFT.

    Raises ArtefactError if they name none.
    """
    targets = configuration.values["target_modules"]
    if targets == "all-linear" or not targets:
        configuration.refuse("target_modules", "what PEFT saves, names or a regular expression")
    listed = configuration.texts("target_modules")
    found = [
        name
        for name, _ in model.named_modules()
        if name
        and _named(name, "target_modules", configuration)
        and not _excluded(name, configuration)
        and (isinstance(targets, str) or name in listed or _in_layers(name, configuration))
    ]
    if not found:
        raise ArtefactError(
            f"{configuration.where}: target_modules={targets!r} names no module of "
            f"{type(model).__name__}. Load the backbone that it was made for."
        )
    return found


def _named(name: str, key: str, configuration: Configuration) -> bool:
    value = configuration.values.get(key)
    if isinstance(value, str):
        return matching(value, name, configuration.where) is not None
    return ends(name, configuration.texts(key))


def _excluded(name: str, configuration: Configuration) -> bool:
    if _named(name, "exclude_modules", configuration):
        return True
    kept, where = configuration.texts("modules_to_save"), configuration.where
    forms = (rf"(^|.*\.){one}($|\..*)" for one in kept)
    return any(matching(form, name, where, whole=False) for form in forms)


def _in_layers(name: str, configuration: Configuration) -> bool:
    layers = configuration.wholes("layers_to_transform")
    if not layers:
        return True
    patterns = configuration.texts("layers_pattern")
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    for start in starts:
        pattern = rf"{start}\.(?P<layer_of_it>\d+)\."
        found = matching(pattern, name, configuration.where, whole=False)
        if found is not None:
            return int(found["layer_of_it"]) in layers
    return False


def saved(model: nn.Module, names: Collection[str]) -> list[str]:
    """The modules that `modules_to_save` names: those whose names end so, dot or not."""
    return [
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if name and any(one and name.endswith(one) for one in names)
    ]


def valued(
    pattern: Mapping[str, Any], name: str, default: Any, where: str, *, behind_a_dot: bool = False
) -> Any:
    """The value of a pattern such as `rank_pattern` at a module, by the rules of PEFT.

    Args:
        pattern: values by regular expressions, or by names.
        name: of the module.
        default: where none matches.
        where: the file, as errors name it.
        behind_a_dot: whether an expression must match behind a dot, as some kinds have it.
    """
    for key, value in pattern.items():
        form = rf".*\.{key}$" if behind_a_dot else rf"(.*\.)?({key})$"
        if matching(form, name, where, whole=False):
            return value
    return pattern.get(name, default)


def target_of(model: nn.Module, paths: Sequence[str], face: Face) -> str:
    """The shortest target that names these modules and no other.

    Raises TargetError where no target does.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = set(paths)
    terms: dict[str, None] = {}
    covered: set[str] = set()
    for path in paths:
        if path in covered:
            continue
        parts = path.split(".")
        for start in range(len(parts) - 1, -1, -1):
            term = ".".join(parts[start:])
            named = {name for name in names if ends(name, [term])}
            if named <= wanted and not _other_meaning(term):
                terms[term] = None
                covered |= named
                break
    plain = " | ".join(terms)
    if covered == wanted and _found(model, plain, face) == wanted:
        return plain
    spelled = "re:" + "|".join(map(re.escape, paths))
    if _found(model, spelled, face) != wanted:
        raise TargetError(f"No target names {', '.join(paths[:3])} and no other module.")
    return spelled


def _other_meaning(term: str) -> bool:
    """Whether a target means something else by it than the end of a name."""
    return bool(_MARKS & set(term)) or Role.parse(term) is not None


def _found(model: nn.Module, target: str, face: Face) -> set[str]:
    return {site.path for site in find_sites(model, target, face)}
