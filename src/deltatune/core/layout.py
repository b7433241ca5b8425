"""Layouts: which sites and leaves an expression has on a model, before anything exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn

from deltatune.core.errors import (
    ConfigurationError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.grammar import Expression
from deltatune.core.in_place import in_place_leaves
from deltatune.core.leaf import Leaf
from deltatune.core.method import Method
from deltatune.core.mixer import Mixer
from deltatune.core.mixing import mixed_sites
from deltatune.core.quantised import format_of
from deltatune.core.roles import places
from deltatune.core.seam import SEAMS
from deltatune.core.select import Form
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.core.target import find_sites, site_at
from deltatune.core.whole import identity

__all__ = ["Part", "Sharing", "layout", "leaves_of", "shared_names"]

Sharing = Literal["none", "method", "all"]


@dataclass(frozen=True)
class Part:
    """One method of an expression with its sites on a model.

    Attributes:
        key: the prefix of its leaves: the method's name, with a number where it occurs again.
        names: for each site, the method's leaf names to full names.
        leaves: full names to descriptions, tied ones once.
        forms: of a `select` method, for each site, the parameters that it tunes.
    """

    key: str
    method: Method
    sites: tuple[Site, ...]
    names: tuple[Mapping[str, str], ...]
    leaves: Mapping[str, Leaf]
    forms: tuple[Mapping[str, Form], ...] = ()


@dataclass
class _Placed:
    """A site with what a method keeps there.

    Attributes:
        own: the method's leaf names to descriptions.
        holders: leaf names to the name of the site under which the leaf is kept.
        forms: of a `select` method, the parameters that it tunes.
    """

    site: Site
    own: dict[str, Leaf] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)


def layout(model: nn.Module, expression: Expression) -> tuple[Part, ...]:
    """The sites and leaves of an expression on a model. Changes nothing and reads no weight.

    Raises:
        TargetError: a target matches nothing, or what its method cannot use.
        UnsupportedError: the backbone cannot take the face.
    """
    parts: list[Part] = []
    waiting: list[tuple[Mixer, str, int]] = []  # mixers, whose sites are those of their members
    seen: Counter[str] = Counter()
    for method in expression.methods:
        seen[method.name] += 1
        times = seen[method.name]
        key = method.name if times == 1 else f"{method.name}.{times}"
        if isinstance(method, Mixer):
            waiting.append((method, key, len(parts)))
        elif method.in_place:
            _check_plain(model, method)
            parts.append(Part(key, method, (), (), in_place_leaves(model, key)))
        else:
            parts.append(_part(method, key, _placed(model, method)))
    _check_weights(parts)
    for mixer, key, place in reversed(waiting):
        members = parts[place : place + mixer.members]
        sites = mixed_sites(model, mixer, members)
        kept = map(_frozen, members) if mixer.frozen else members
        own = _part(mixer, key, [_Placed(site, dict(mixer.init(site))) for site in sites])
        parts[place : place + mixer.members] = [own, *kept]
    return tuple(parts)


def _placed(model: nn.Module, method: Method) -> list[_Placed]:
    """The sites of a method with what it keeps there."""
    if method.face in SEAMS:
        found = SEAMS[method.face].sites(model, method.target)
    else:
        found = find_sites(model, method.target, method.face)
    sites = method.choose(found)
    if method.face == "select":
        return _selected(model, method, sites)
    return [_Placed(site, dict(method.init(site))) for site in sites]


def _part(method: Method, key: str, placed: Sequence[_Placed]) -> Part:
    """A method with its sites, its leaves under their full names. Raises TargetError for none."""
    names = [
        {
            n: f"{key}/{leaf.tie or one.holders.get(n, one.site.name)}/{n}"
            for n, leaf in one.own.items()
        }
        for one in placed
    ]
    leaves = {
        full[n]: leaf
        for one, full in zip(placed, names, strict=True)
        for n, leaf in one.own.items()
    }
    if not leaves:
        raise TargetError(
            f"{method.name} finds nothing to tune at {method.target!r}. "
            "Choose a target whose modules have what it tunes."
        )
    held, forms = tuple(one.site for one in placed), tuple(one.forms for one in placed)
    return Part(key, method, held, tuple(names), leaves, forms)


def _frozen(part: Part) -> Part:
    return replace(part, leaves={n: replace(o, trained=False) for n, o in part.leaves.items()})


def leaves_of(parts: Sequence[Part]) -> dict[str, Leaf]:
    """Full names to descriptions, of all parts."""
    return {name: leaf for part in parts for name, leaf in part.leaves.items()}


def shared_names(parts: Sequence[Part], sharing: Sharing) -> set[str]:
    """The full names of the leaves that the slots of a bank have in common.

    Raises:
        UnknownNameError: there is no such sharing.
        ConfigurationError: nothing would be shared, or nothing left to a slot.
        UnsupportedError: a method that acts on every step of its slot would share leaves.
    """
    if sharing not in get_args(Sharing):
        raise UnknownNameError("sharing", sharing, get_args(Sharing))
    found: set[str] = set()
    for part in parts if sharing != "none" else ():
        method = part.method
        whole = sharing == "all" and method.category != "head"
        mine = {n for n in part.leaves if whole or n.rpartition("/")[2] in method.shared_leaves}
        acts = method.has_policy() or method.has_penalty() or method.wanted is not None
        if mine and (acts or method.in_place):
            raise UnsupportedError(
                f"{method.name} acts on the leaves of one slot, which several cannot share. Attach "
                "one slot for all tasks, or slots that share nothing."
            )
        found |= mine
    trained = {name for name, leaf in leaves_of(parts).items() if leaf.trained}
    if sharing != "none" and (not found or not trained - found):
        what = (
            "name no leaf that slots share" if not found else "leave no leaf to a slot of its own"
        )
        raise ConfigurationError(
            f"{' + '.join(part.method.name for part in parts)} {what}: sharing={sharing!r} has no "
            "meaning here. Leave it out, with one slot for all tasks or a slot for each."
        )
    return found


def _selected(model: nn.Module, method: Method, sites: Sequence[Site]) -> list[_Placed]:
    """The sites of a `select` method where it tunes anything, with their forms.

    A parameter that is tied is tuned once, under the name of the first of the sites, and acts
    wherever a module of the model holds it.
    """
    placed = {site.name: _Placed(site) for site in sites}
    first: dict[tuple[int, str], tuple[Site, Form]] = {}
    for site in sites:
        for name, form in method.select(site).items():
            parameter = site.parameters.get(name)
            holder = (site, form)
            if parameter is not None:
                holder = first.setdefault((identity(site.module, name), name), holder)
            _keep(placed[site.name], name, *holder)
    known = {place.module: place for place in places(model)} if first else {}
    for path, module in model.named_modules():
        for name in module._parameters:
            key = (identity(module, name), name)
            if key not in first:
                continue
            site, form = first[key]
            if path not in placed:
                place = known.get(path, site.place)
                placed[path] = _Placed(site_at(module, path, place and replace(place, share=None)))
            _keep(placed[path], name, site, form)
    return [one for one in placed.values() if one.forms]


def _keep(placed: _Placed, name: str, holder: Site, form: Form) -> None:
    """Adds a form on one parameter, whose leaves are kept under the holder's name."""
    leaves = form.leaves(holder, name)
    placed.own |= leaves
    placed.holders |= dict.fromkeys(leaves, holder.name)
    placed.forms[name] = form


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
