"""Invertible adapter: [a + F(b); b + G(a + F(b))] in front of the first block, undone at the head.

Pfeiffer et al. 2020, arXiv:2005.00052. Of MAD-X: h = [a; b] are the halves of the stream, F and G
bottlenecks that all sites share; in front of the head that gives words the inverse is taken, [y; z]
to [y - F(z - G(y)); z - G(y)]. U starts at zero. The authors' bottlenecks are a quarter of the
width. A head that is narrower than what it reads classifies, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.core.errors import TargetError
from deltatune.core.leaf import Leaf
from deltatune.core.method import Leaves, Method, ReviewCategory, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck


@register("invertible")
@dataclass(frozen=True, kw_only=True)
class Invertible(Bottleneck, Method):
    """A coupling of the two halves of the stream, and its inverse."""

    review_category: ClassVar[ReviewCategory] = "additive"
    default_at: ClassVar[str] = "block[0].residual | head"
    at_input: ClassVar[bool] = True
    count: ClassVar[str] = "2dm + 2m + d once"

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        kept = [
            site
            for site in sites
            if site.part == "residual" or (site.part == "head" and site.outputs > site.inputs)
        ]
        if not any(site.part == "residual" for site in kept):
            raise TargetError(
                "invertible acts in front of a block and undoes it in front of a head: 'residual' "
                f"and 'head'; found {', '.join(site.name for site in sites)}."
            )
        return kept

    def at_site(self, site: Site) -> Method:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Inverse(**own) if site.part == "head" else self

    def init(self, site: Site) -> Mapping[str, Leaf]:
        if site.inputs % 2:
            raise TargetError(
                f"invertible: a width of {site.inputs} at {site.path} has no halves. Choose a "
                "backbone of an even width."
            )
        half, tie = self.leaves(site.inputs // 2, site.inputs // 2), f"{site.inputs}"
        return {f"{k}.{name}": leaf.tied(tie) for k in "FG" for name, leaf in half.items()}

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        a = a + self.half("F", b, p)
        return torch.cat([a, b + self.half("G", a, p)], dim=-1)

    def half(self, name: str, x: Tensor, p: Leaves) -> Tensor:
        """F or G of one half, [..., d / 2]."""
        return self.apply(
            x, {leaf: p[f"{name}.{leaf}"] for leaf in "DUce" if f"{name}.{leaf}" in p}
        )


class _Inverse(Invertible):
    """What stands in front of the head."""

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        b = b - self.half("G", a, p)
        return torch.cat([a - self.half("F", b, p), b], dim=-1)
