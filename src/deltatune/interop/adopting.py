"""What a folder of another library becomes: an attached delta that knows where it is from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.core.attaching import attach_values
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError
from deltatune.core.grammar import Expression
from deltatune.core.layout import Part, layout, leaves_of

__all__ = ["adopt", "check_sizes"]

_LARGEST = 2**40  # entries; no tensor of a delta has more


def check_sizes(parts: Sequence[Part], where: str) -> None:
    """Raises ArtefactError for a leaf that no delta could have, before any is allocated."""
    for name, leaf in leaves_of(parts).items():
        if math.prod(leaf.shape) > _LARGEST:
            raise ArtefactError(f"{where} asks for {name} of shape {leaf.shape}, too large.")


def adopt(
    model: nn.Module,
    expression: Expression,
    leaves: Mapping[str, Tensor],
    *,
    library: str,
    configuration: Mapping[str, Any],
    seed: int,
) -> Delta:
    """Attaches leaves, by full name. `delta.origins[0]` says which library's they were, and that
    the backbone is not verified.
    """
    parts = layout(model, expression)
    delta = attach_values(model, expression, parts, leaves, seed=seed)
    delta.origins[0] = {
        "library": library, "backbone_verified": False, "configuration": configuration,
    }  # fmt: skip
    return delta
