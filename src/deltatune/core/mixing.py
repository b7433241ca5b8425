"""How mixers act: what their members make of a site, weighed.

Members act each by itself on what the module gives with everything else that is attached to it
folded in; their changes, weighed, are added in the place of the mixer among the output faces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.errors import TargetError
from deltatune.core.method import Method
from deltatune.core.mixer import Mixer
from deltatune.core.rows import by_slot
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.chain import Chain
    from deltatune.core.layout import Part
    from deltatune.core.link import Link

__all__ = ["join", "mixed", "mixed_sites", "weights_of"]


def mixed_sites(model: nn.Module, mixer: Method, members: Iterable[Part]) -> list[Site]:
    """The sites of a mixer on a model: those of its members, each with how many act there.

    Raises TargetError for one that reads ids, by which nothing can be weighed.
    """
    found: dict[str, Site] = {}
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    for part in members:
        for site in part.sites:
            if isinstance(site.module, nn.Embedding):
                raise TargetError(
                    f"{mixer.name} weighs by the features that a site reads, and {site.path} reads "
                    f"ids. Choose a target of {part.method.name} without it."
                )
            if part.method.face == "attend" and width:
                # It is weighed by what the attention reads, not by what its keys are made of.
                site = replace(site, inputs=width)
            name = _name(part.method, site)
            count = found[name].members if name in found else 0
            found[name] = replace(site, name=name, members=count + 1, width=width)
    # What is weighed at a module comes before the span that ends there, as folds do before outputs.
    return sorted(found.values(), key=lambda site: site.entry is not None)


def join(parts: Sequence[Part], links: Sequence[Link]) -> None:
    """Gives the links of each mixer among the parts of a delta those that they weigh."""
    for place, part in enumerate(parts):
        if not isinstance(part.method, Mixer):
            continue
        own = {link.site.name: link for link in links if link.part == part.key}
        keys = {part.key for part in parts[place + 1 : place + 1 + part.method.members]}
        for link in links:
            if link.part in keys:
                link.mixer = own[_name(link.method, link.site)]
                link.mixer.members.append(link)


def _name(method: Method, site: Site) -> str:
    """The name of the site of a mixer. An attention is weighed apart from its virtual tokens."""
    return f"{site.name}.tokens" if method.face == "attend" else site.name


def mixed(
    chain: Chain, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor:
    """The output [rows, ..., features] after what a mixer's members add to it, weighed."""
    x = link.entry_input if link.site.entry is not None else args[0]
    link.entry_input = None
    assert x is not None
    link.check_rows(y.shape[0])
    part = link.cut(y)
    # Once for all members that fold.
    base = chain.base(*args, **kwargs) if any(map(_folds, link.members)) else y
    added = [link.cut(_alone(chain, one, args, kwargs, y, base)) - part for one in link.members]
    weights = weights_of(link, x, torch.stack([part, *added], dim=-2))
    change = (torch.stack(added, dim=-2) * weights.unsqueeze(-1)).sum(-2)
    return link.paste(y, (part + change).to(y.dtype))


def _folds(link: Link) -> bool:
    """Whether a member is computed by weights of its own in place of the base's."""
    return link.method.face != "output" and not link.method.has_fast() and not link.adds_bias


def _alone(
    chain: Chain,
    link: Link,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Tensor,
    base: Tensor,
) -> Tensor:
    """The output with one member, and no other. `base` is what those that fold are held against."""
    if _folds(link):
        changed: Tensor = chain.folded([link], args, kwargs) - base
        return y + changed
    return chain.act(link, args, y) if link.method.face == "output" else chain.add(link, args, y)


def weights_of(link: Link, x: Tensor, z: Tensor | None) -> Tensor:
    """The weights of a mixer's members, [rows, ..., members], its strength in them; zero in rows
    without a delta. For `x` and `z` see `Method.mix`.
    """
    if x.dim() == 4 and x.shape[1] == 1:  # a head for itself, as multi-head latent attention has
        alone = None if z is None else z.squeeze(1)
        return weights_of(link, x.squeeze(1), alone).unsqueeze(1)
    rows = link.rows(x.shape[0])
    none = x.new_zeros(*x.shape[:-1], link.site.members)
    if rows.empty:
        return none
    text = None if link.reader is None else link.reader.of_tokens(link, x)
    leaves = link.stacked(x.dtype)
    weights: Tensor = by_slot(link.method.mix, rows, x, z, text, leaves, none)
    return weights * link.method.strength
