"""Seams: where a face needs more than a module's forward, its owner registers here.

`attend` and `embed` lengthen sequences; masks, positions and caches then have one owner, which
lives in `backbones`, where attention and token stacks are known. The kernel asks it for sites and
hands it links.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from deltatune.core.link import Link
from deltatune.core.registry import Registry
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.host import Host

__all__ = ["SEAMS", "Seam"]


class Seam(abc.ABC):
    """The owner of one face's way into a model."""

    @abc.abstractmethod
    def sites(self, model: nn.Module, target: str) -> Sequence[Site]:
        """The sites that `target` names for this face. Raises TargetError, UnsupportedError."""

    @abc.abstractmethod
    def install(self, host: Host, links: Sequence[Link]) -> None:
        """Makes the links act."""

    @abc.abstractmethod
    def remove(self, host: Host, links: Sequence[Link]) -> None:
        """Undoes `install`, bit for bit."""


SEAMS: Registry[Seam] = Registry("face with a seam", source="deltatune.backbones")
