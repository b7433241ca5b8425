"""Whether probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.errors import ConfigurationError

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True)
class Calibration:
    """Of probabilities against the right classes.

    Attributes:
        accuracy: share of rows whose likeliest class is right.
        nll: the mean of -log p of the right class, in nats.
        ece: expected calibration error: the mean over rows of |accuracy - confidence| of the bin
            that a row's largest probability falls into.
    """

    accuracy: float
    nll: float
    ece: float


def calibration(
    probabilities: Tensor, labels: Sequence[int] | Tensor, *, bins: int = 15
) -> Calibration:
    """How well probabilities [rows, classes] are calibrated, in bins of equal width.

    Raises ConfigurationError for no rows, no bins, or labels that do not fit.
    """
    right = torch.as_tensor(labels, device=probabilities.device)
    if not len(right) or bins < 1 or probabilities.shape[:1] != right.shape:
        raise ConfigurationError(
            "Calibration needs probabilities [rows, classes], a label for each row and at least "
            f"one bin; found {tuple(probabilities.shape)}, {len(right)} labels, bins={bins}."
        )
    p = probabilities.double()
    confidence, guess = p.max(dim=1)
    hit = (guess == right).double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=p.dtype, device=p.device).index_add_(0, places, hit - confidence)
    chosen = p.gather(1, right[:, None]).clamp_min(torch.finfo(p.dtype).tiny)
    return Calibration(
        accuracy=float(hit.mean()),
        nll=float(-chosen.log().mean()),
        ece=float(gaps.abs().sum() / len(right)),
    )
