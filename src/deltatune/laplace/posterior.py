"""N(θ, (H + λ I)⁻¹) over the leaves θ of a trained delta, and what follows for its logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError
from deltatune.laplace.curvature import Block, matrix_shape
from deltatune.laplace.rows import Batch, Read, copies, gradients, outputs, pieces

__all__ = ["Posterior"]

_LEAST, _MOST = -12.0, 12.0  # decades within which a precision is looked for


@dataclass(frozen=True, eq=False)
class Posterior:
    """A posterior, made by `fit` or `load`.

    Attributes:
        delta, slot: whose leaves; they are its mean.
        blocks: the curvature H of each trained leaf.
        precision: λ, of the prior N(0, I / λ).
        noise: the variance of a regression's labels; None for classes.
        rows: of data that H was gathered from.
        together: rows that one pass of the model may have.
        read: takes logits [rows, classes] from what the model gives.
    """

    delta: Delta
    slot: int
    blocks: Mapping[str, Block]
    precision: float
    noise: float | None
    rows: int
    together: int
    read: Read = field(repr=False)

    def __post_init__(self) -> None:
        if not self.precision > 0 or not math.isfinite(self.precision):
            raise ConfigurationError(f"A precision lies above 0; found {self.precision}.")

    def evidence(self, precision: float) -> float:
        """The log marginal likelihood of a precision, less the log likelihood at the mean."""
        logs = torch.log1p(self._values() / precision).sum()
        return -0.5 * (precision * self._square() + float(logs))

    def best(self) -> Posterior:
        """The same with the precision of the largest marginal likelihood, where
        Σ h / (h + λ) = λ |θ|².

        It has one maximum; it is found to a relative error of 1e-9, within 1e-12 and 1e12.
        """
        values, square = self._values(), self._square()
        low, high = _LEAST, _MOST
        while high - low > 1e-10:
            middle = 10 ** ((low + high) / 2)
            more = float((values / (values + middle)).sum()) > middle * square
            low, high = ((low + high) / 2, high) if more else (low, (low + high) / 2)
        return replace(self, precision=10 ** ((low + high) / 2))

    def at(self, precision: float) -> Posterior:
        """The same with another precision, above 0, else ConfigurationError is raised."""
        return replace(self, precision=precision)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean [rows, classes] and covariance [rows, classes, classes] of a batch's logits, fp64.

        Logits are linearised in the leaves: the mean is what the delta gives, the covariance
        J (H + λ I)⁻¹ Jᵀ. Noise is not in it. Raises as `fit`.
        """
        found: list[tuple[Tensor, Tensor]] = []
        with copies(self.delta, self.slot, self.together) as copy:
            for piece in pieces(batch, self.together):
                mean = outputs(copy, piece, self.read)
                along = torch.eye(mean.shape[1])
                each = [gradients(copy, mean, one.expand(mean.shape)) for one in along]
                spread = sum(
                    self._spread(block, torch.stack([g[name] for g in each], dim=1))
                    for name, block in self.blocks.items()
                )
                assert isinstance(spread, Tensor)
                found.append((mean.detach().cpu().double(), spread))
        means, covariances = zip(*found, strict=True)
        return torch.cat(means), torch.cat(covariances)

    def probabilities(self, batch: Batch, *, samples: int = 0, seed: int = 0) -> Tensor:
        """Probabilities of the classes, [rows, classes], fp64.

        Args:
            batch: keyword arguments of the model; labels are left out.
            samples: of the logits, over which softmax is averaged; 0 takes
                softmax(f / √(1 + π v / 8)), v the variances.
            seed: of the samples.

        Raises ConfigurationError for a regression, and as `logits`.
        """
        if self.noise is not None:
            raise ConfigurationError("A regression has no classes. Take `logits`.")
        mean, covariance = self.logits(batch)
        if not samples:
            variances = covariance.diagonal(dim1=-2, dim2=-1)
            return (mean / (1 + math.pi / 8 * variances).sqrt()).softmax(-1)
        values, vectors = torch.linalg.eigh(covariance)
        random = torch.Generator().manual_seed(seed)
        drawn = torch.randn(samples, *mean.shape, generator=random, dtype=mean.dtype)
        spread = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return (mean + torch.einsum("rij,srj->sri", spread, drawn)).softmax(-1).mean(0)

    def save(self, path: str | Path) -> Path:
        """Writes all but the leaves into one safetensors file, beside the artefact of the delta;
        see `load`. Raises ArtefactError if it cannot be written.
        """
        from deltatune.laplace.files import save

        return save(self, Path(path))

    def _spread(self, block: Block, J: Tensor) -> Tensor:
        """What one leaf adds to the covariance, from gradients [rows, classes, *shape]."""
        J = J.reshape(*J.shape[:2], *matrix_shape(tuple(J.shape[2:])))
        flat, inside = J.flatten(-2), block.project(J)
        known = block.values / (
            block.values + self.precision
        )  # the share of the prior's variance that is gone
        return (flat @ flat.mT - (inside * known) @ inside.mT) / self.precision

    def _values(self) -> Tensor:
        return torch.cat([block.values for block in self.blocks.values()])

    def _square(self) -> float:
        held = self.delta.tensors(self.slot)
        return float(sum(held[name].double().square().sum() for name in self.blocks))
