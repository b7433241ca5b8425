"""Merging: one slot of a delta written into the backbone's weights, and taken out again.

What stood there before is kept beside the delta, so that unmerging gives back every bit. Merged
deltas form a stack: the last one merged is the first to be unmerged.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from deltatune.core.errors import StateError, UnsupportedError
from deltatune.core.method import MERGED
from deltatune.core.quantised import Quantised
from deltatune.core.site import keep, release
from deltatune.core.storage import storage_of
from deltatune.core.whole import is_apart

if TYPE_CHECKING:
    from deltatune.core.chain import Chain
    from deltatune.core.delta import Delta
    from deltatune.core.link import Link

__all__ = ["Folds", "Kept", "merge", "unmerge"]

Kept: TypeAlias = dict[tuple[str, str], Tensor]


class Folds:
    """What merging one slot would write, computed module by module; nothing is written.

    Args:
        delta: that is to be merged.
        slot: which of its slots.

    Attributes:
        modules: those that it changes, by path.

    Raises UnsupportedError or StateError where it cannot be merged, see `Delta.merge`.
    """

    def __init__(self, delta: Delta, slot: int) -> None:
        _check(delta)
        self._delta, self._slot = delta, slot
        self._chains: dict[nn.Module, tuple[Chain, list[Link]]] = {}
        for chain in delta.host.chains:
            links = [link for link in chain.links if link.delta is delta]
            if links:
                self._chains[chain.module] = chain, links
        self.modules = {links[0].site.path: m for m, (_, links) in self._chains.items()}

    @torch.no_grad()
    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters of a module that change, by name, each in its own dtype; none of a module
        that the delta leaves as it is.

        Raises UnsupportedError where a parameter is not there.
        """
        if module not in self._chains:
            return {}
        chain, links = self._chains[module]
        with self._delta.route([self._slot]):
            values = chain.parameters(links, (self._slot,) * len(links))
        found: dict[str, Tensor] = {}
        for name in set[str]().union(*(link.touched for link in links)) & set(values):
            parameter = module._parameters.get(name)
            if parameter is None:
                raise UnsupportedError(
                    f"{links[0].site.path} has no {name}: {self._delta.name} created one, and "
                    "merging it would change the backbone's architecture. Keep the delta attached."
                )
            found[name] = values[name].to(parameter.dtype)
        return found


@torch.no_grad()
def merge(delta: Delta, slot: int) -> None:
    """See `Delta.merge`."""
    folds = Folds(delta, slot)
    # All of them before the first is written: what cannot be merged leaves the model as it was.
    folded = [(path, module, folds.of(module)) for path, module in folds.modules.items()]
    for path, module, values in folded:
        for name, value in values.items():
            parameter = module.get_parameter(name)
            delta.kept_weights[path, name] = parameter.detach().clone()
            keep(module, name, delta.kept_weights[path, name])
            parameter.data.copy_(value)
    delta.host.merged.append(delta)
    delta.merged_slot = slot


@torch.no_grad()
def unmerge(delta: Delta) -> None:
    """See `Delta.unmerge`."""
    merged = delta.host.merged
    if not delta.merged:
        raise StateError(f"{delta.name} is not merged.")
    if merged[-1] is not delta:
        raise StateError(f"Unmerge {merged[-1].name} first: it was merged later.")
    for (path, name), value in delta.kept_weights.items():
        module = delta.model.get_submodule(path)
        module.get_parameter(name).data.copy_(value)
        release(module, name, value)
    delta.kept_weights.clear()
    merged.pop()
    delta.merged_slot = None


def _check(delta: Delta) -> None:
    """Raises StateError or UnsupportedError where a delta cannot be merged."""
    if delta.merged or not delta.attached:
        raise StateError(f"{delta.name} is {'merged already' if delta.merged else 'not attached'}.")
    if not delta.enabled:
        raise StateError(
            f"{delta.name} is switched off; merged it would act. Leave `active(False)` first."
        )
    owners = Counter(
        id(parameter)
        for module in delta.model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for link in delta.links:
        if link.method.face not in MERGED:
            raise UnsupportedError(
                f"{link.method.name} acts on activations, so it cannot be written into "
                "weights. Keep it attached."
            )
        if is_apart(link.site.module):
            raise UnsupportedError(
                f"{link.site.path} is sharded, offloaded or without weights, so that {delta.name} "
                "cannot be written into it. Merge into a model that is loaded as a whole."
            )
        _check_plain(link)
        for name in link.touched:
            parameter = link.site.parameters.get(name)
            if parameter is not None and owners[id(parameter)] > 1:
                raise UnsupportedError(
                    f"{link.site.path}.{name} is tied to another module, which merging would "
                    "change too. Keep the delta attached."
                )
        chain = delta.host.chain(link.site.module)
        first = next(held for held in chain.links if not held.delta.merged)
        if first.delta is not delta:
            raise StateError(f"Merge {first.delta.name} first: it acts before {delta.name}.")


def _check_plain(link: Link) -> None:
    """Raises UnsupportedError where a quantised weight would be written."""
    module, storage = link.site.module, storage_of(link.site.module)
    if isinstance(storage, Quantised) and "weight" in link.touched:
        raise UnsupportedError(
            f"{link.site.path} is kept as {storage.format(module)}, and merging "
            f"{link.method.name} would round its weight anew. Keep the delta attached, or load it "
            "on the backbone in plain numbers (`across_formats=True`) and merge it there."
        )
