"""Layouts: which sites and leaves an expression has on a model, before anything exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltatune.core.errors import TargetError, UnsupportedError
from deltatune.core.grammar import Expression
from deltatune.core.in_place import in_place_leaves
from deltatune.core.leaf import Leaf
from deltatune.core.method import Method
from deltatune.core.quantised import format_of
from deltatune.core.seam import SEAMS
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.core.target import find_sites

__all__ = ["Part", "layout", "leaves_of"]


@dataclass(frozen=True)
class Part:
    """One method of an expression with its sites on a model.

    Attributes:
        key: the prefix of its leaves: the method's name, with a number where it occurs again.
        names: for each site, the method's leaf names to full names.
        leaves: full names to descriptions, tied ones once.
    """

    key: str
    method: Method
    sites: tuple[Site, ...]
    names: tuple[Mapping[str, str], ...]
    leaves: Mapping[str, Leaf]


def layout(model: nn.Module, expression: Expression) -> tuple[Part, ...]:
    """The sites and leaves of an expression on a model. Changes nothing and reads no weight.

    Raises:
        TargetError: a target matches nothing, or what its method cannot use.
        UnsupportedError: the backbone cannot take the face.
    """
    parts: list[Part] = []
    for method in expression.methods:
        same = sum(part.method.name == method.name for part in parts)
        key = method.name if not same else f"{method.name}.{same + 1}"
        if method.in_place:
            _check_plain(model, method)
            parts.append(Part(key, method, (), (), in_place_leaves(model, key)))
            continue
        if method.face in SEAMS:
            found = SEAMS[method.face].sites(model, method.target)
        else:
            found = find_sites(model, method.target, method.face)
        sites = tuple(method.choose(found))
        names: list[dict[str, str]] = []
        leaves: dict[str, Leaf] = {}
        holders: dict[int, str] = {}
        for site in sites:
            own = method.init(site)
            names.append(
                {
                    n: f"{key}/{leaf.tie or _holder(site, n, method, holders)}/{n}"
                    for n, leaf in own.items()
                }
            )
            leaves |= {names[-1][n]: leaf for n, leaf in own.items()}
        if not leaves:
            raise TargetError(
                f"{method.name} finds nothing to tune at {method.target!r}. "
                "Choose a target whose modules have what it tunes."
            )
        parts.append(Part(key, method, sites, tuple(names), leaves))
    _check_weights(parts)
    return tuple(parts)


def leaves_of(parts: Sequence[Part]) -> dict[str, Leaf]:
    """Full names to descriptions, of all parts."""
    return {name: leaf for part in parts for name, leaf in part.leaves.items()}


def _holder(site: Site, leaf: str, method: Method, holders: dict[int, str]) -> str:
    """The site under whose name a leaf is kept: of a selected parameter that is tied, the first."""
    parameter = site.parameters.get(leaf.partition(".")[0])
    if method.face != "select" or parameter is None:
        return site.name
    return holders.setdefault(id(parameter), site.name)


def _check_plain(model: nn.Module, method: Method) -> None:
    kept = format_of(model)
    if kept is not None:
        raise UnsupportedError(
            f"{method.name} trains the backbone itself, and weights kept as {kept} cannot be "
            "trained. Load the backbone without quantising it, or train a delta."
        )


def _check_weights(parts: Sequence[Part]) -> None:
    for part in parts:
        for site in part.sites:
            if part.method.face == "weight" and not storage_of(site.module).linear:
                raise TargetError(
                    f"{part.method.name} needs a linear weight; {site.path} is a "
                    f"{type(site.module).__name__}. Choose a target that names linear modules."
                )
