"""Bottlenecks whose two maps are products of smaller tensors."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.primitives.bottleneck import Bottleneck

__all__ = ["Factored"]


@dataclass(frozen=True, kw_only=True)
class Factored(Bottleneck):
    """What such bottlenecks have in common; a method says how its maps are made."""

    bottleneck: int = 24
    activation: str = "gelu"

    learning_rate: ClassVar[float] = 3e-3
    identity: ClassVar[bool] = False

    def check(self) -> None:
        """Raises ConfigurationError for `up_std`, which has no map to act on."""
        super().check()
        if self.up_std:
            raise ConfigurationError(
                f"{self.name} starts as Glorot does, so up_std has no meaning. Leave it out."
            )

    @abc.abstractmethod
    def maps(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """D [m, width] and U [width, m]."""

    def output(self, x: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """y + BN(y)."""
        del x
        D, U = self.maps(p)
        return y + self.apply(y, {**p, "D": D, "U": U})
