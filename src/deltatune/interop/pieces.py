"""What a folder has, place by place: methods, the tensors of each, and the leaves that they are.

Where a folder is only read, a dialect says of each place which method acts there, which tensors
the folder has for it, and how they become leaves. Equal methods are one, at all of their places.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from deltatune.core.errors import ArtefactError, TargetError
from deltatune.core.grammar import Expression
from deltatune.core.layout import Part, layout, leaves_of
from deltatune.core.leaf import draw
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.interop.adopting import check_sizes
from deltatune.interop.dialects.dialect import placed
from deltatune.interop.dialects.modules import check_untied
from deltatune.interop.places import target_of

__all__ = ["Piece", "Pieces", "Shapes"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """What a folder has for one place.

    Attributes:
        method: which acts there, without a target.
        at: the target that names the place and no other.
        shapes: the tensors of the folder, by name.
        make: from them, and a site of the place, to leaves by the method's names for them. A leaf
            that it leaves out is what it begins as.
        module: whether `at` is the name of a module.
    """

    method: Method
    at: str
    shapes: Shapes
    make: Callable[[Leaves, Site], Mapping[str, Tensor]]
    module: bool = True


@dataclass(frozen=True)
class Pieces:
    """All that a folder has, on a model.

    Attributes:
        where: the folder, as errors name it.
        parts: the methods with their sites.
        owners: for each part the piece of each site, by the name of the site.
        shapes: the tensors that the folder must have.
    """

    where: str
    parts: tuple[Part, ...]
    owners: tuple[Mapping[str, Piece], ...]
    shapes: Shapes

    @classmethod
    def of(cls, pieces: Sequence[Piece], model: nn.Module, where: str) -> Self:
        """Lays them out; allocates nothing. Raises ArtefactError for none, and for too large ones.

        Raises DeltatuneError where a method or the model refuses it.
        """
        if not pieces:
            raise ArtefactError(
                f"{where} names no module of {type(model).__name__}. Load the backbone that it was "
                "made for."
            )
        groups: dict[Method, list[Piece]] = {}
        for piece in pieces:
            groups.setdefault(piece.method, []).append(piece)
        parts = layout(model, Expression(tuple(_aimed(m, own, model) for m, own in groups.items())))
        check_sizes(parts, where)
        check_untied([part for part in parts if part.method.face == "select"], where)
        owners = tuple(_owners(own, model) for own in groups.values())
        for part, owned in zip(parts, owners, strict=True):
            if {site.name for site in part.sites} != owned.keys():
                raise TargetError(f"No target names {', '.join(sorted(owned)[:3])} and no other.")
        shapes = {name: shape for piece in pieces for name, shape in piece.shapes.items()}
        return cls(where, parts, owners, shapes)

    @property
    def expression(self) -> Expression:
        """The methods."""
        return Expression(tuple(part.method for part in self.parts))

    def leaves(self, found: Leaves) -> dict[str, Tensor]:
        """The leaves by full name, from the folder's tensors. Raises ArtefactError if they do not
        fit.
        """
        made: dict[str, Tensor] = {}
        for part, owned in zip(self.parts, self.owners, strict=True):
            for _, site, names in placed([part]):
                own = owned[site.name].make(found, site)
                for leaf, full in names.items():
                    made[full] = own[leaf] if leaf in own else draw(part.leaves[full], 0, full)
        for full, one in leaves_of(self.parts).items():
            if tuple(made[full].shape) != one.shape:
                raise ArtefactError(f"{self.where} does not fill {full}.")
        return made


def _owners(pieces: Sequence[Piece], model: nn.Module) -> dict[str, Piece]:
    """The piece of each site, by the name of the site."""
    found: dict[str, Piece] = {}
    for piece in pieces:
        one = Expression((dataclasses.replace(piece.method, at=piece.at),))
        for _, site, _ in placed(layout(model, one)):
            if found.setdefault(site.name, piece) is not piece:
                raise TargetError(f"{piece.method.name} acts twice at {site.name}.")
    return found


def _aimed(method: Method, pieces: Sequence[Piece], model: nn.Module) -> Method:
    """A method with a short target that names the places of its pieces."""
    modules = list(dict.fromkeys(piece.at for piece in pieces if piece.module))
    roles = list(dict.fromkeys(piece.at for piece in pieces if not piece.module))
    found = [target_of(model, modules, method.face)] if modules else []
    if roles:
        found.insert(0, _short(method, roles, model))
    return dataclasses.replace(method, at=" | ".join(found))


def _short(method: Method, roles: Sequence[str], model: nn.Module) -> str:
    """Roles without their blocks and stacks, where that names the same places."""
    wanted = _sites(model, method, " | ".join(roles))
    for left_out in (r"((encoder|decoder)\.)?block\[\d+\]\.", r"block\[\d+\]\."):
        at = " | ".join(dict.fromkeys(re.sub(left_out, "", role) for role in roles))
        if _sites(model, method, at) == wanted:
            return at
    return " | ".join(roles)


def _sites(model: nn.Module, method: Method, at: str) -> set[str]:
    aimed = Expression((dataclasses.replace(method, at=at),))
    return {site.name for _, site, _ in placed(layout(model, aimed))}
