"""BitFit: b' = b + d for every bias, everything else frozen.

Ben-Zaken et al. 2021, arXiv:2106.10199. Where a linear layer or a norm has no bias (T5, Llama) one
is created as zero, so that the start is the identity (OpenDelta draws it at random). The bias of
keys has a zero gradient in plain softmax attention: it shifts all scores of a query alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core.method import Method, register
from deltatune.primitives.biases import Biases


@register("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(Biases, Method):
    """Trained biases."""

    aliases: ClassVar[tuple[str, ...]] = ("bias_tuning",)
    count: ClassVar[str] = "d"
