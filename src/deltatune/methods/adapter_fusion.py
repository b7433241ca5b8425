"""AdapterFusion: y' = y + V Σ_n a_n z_n, a = softmax_n((Q y + q) · K z_n),
z_n = U_n σ(D_n y + c_n) + e_n.

Pfeiffer et al. 2021, arXiv:2005.00247. The n adapters are frozen; `fill_expert` of `core.start`
copies each from a delta that was trained (`pfeiffer`); until then they are drawn. V starts as the
identity and is pulled there, Q and K start from N(0, 0.02²). A bias of K, which the authors have,
adds the same to all scores and is left out. In post-norm models (BERT) theirs reads LN(h + y); here
the adapters and Q read y, as in `pfeiffer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltatune.core.leaf import Leaf, given, identity, normal, zeros
from deltatune.core.method import Leaves, Method, register
from deltatune.core.site import Site
from deltatune.primitives.bottleneck import Bottleneck
from deltatune.primitives.experts import Experts, several


@register("adapter_fusion")
@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Experts, Bottleneck, Method):
    """An attention over frozen bottlenecks behind every feed-forward.

    Attributes:
        regularisation: weight of the penalty |V - I|², summed over the sites.
    """

    experts: int = 4
    up_std: float = 0.01
    regularisation: float = 0.01

    aliases: ClassVar[tuple[str, ...]] = ("fusion",)
    count: ClassVar[str] = "3 d² + d"
    default_at: ClassVar[str] = "ffn"
    learning_rate: ClassVar[float] = 5e-5
    identity: ClassVar[bool] = False

    def init(self, site: Site) -> Mapping[str, Leaf]:
        d = site.outputs
        adapters = several(super().init(site), self.experts)
        return {
            **{name: replace(leaf, trained=False) for name, leaf in adapters.items()},
            "Q": normal(d, d, std=0.02),
            "q": zeros(d),
            "K": normal(d, d, std=0.02),
            "V": given((d, d), identity),
        }

    def idle(self, site: Site, leaf: str) -> bool:
        return leaf != "V" and self.experts == 1

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        pulled = [(p["V"] - torch.eye(len(p["V"])).to(p["V"])).square().sum() for p in sites]
        return self.regularisation * torch.stack(pulled).sum()

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        own = {name: p[name].unbind(0) for name in ("D", "U", "c", "e") if name in p}
        adapters = ({name: leaf[n] for name, leaf in own.items()} for n in range(self.experts))
        z = torch.stack([self.apply(y, one) for one in adapters], dim=-2)
        scores = linear(z, p["K"]) @ linear(y, p["Q"], p["q"]).unsqueeze(-1)
        return y + linear((scores.softmax(-2) * z).sum(-2), p["V"])
