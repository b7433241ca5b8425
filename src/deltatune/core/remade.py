"""What autograd keeps anyway: of an activation or a norm the input, so that its output need not be.

A map with a difference needs its input in the backward pass. Where that came out of an operation
whose own inputs are kept for its backward pass, it is made again from these: the activation between
the two maps of a feed-forward layer is the largest tensor of a block. The `_saved_*` attributes of
a node are those of torch's notes on autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Remade", "remade"]

_KEY = "deltatune.remade"


Make: TypeAlias = Callable[..., Tensor]
_Operation: TypeAlias = tuple[Make, tuple[Tensor | None, ...]]


@dataclass
class Remade:
    """A tensor that can be made again, for all maps that read it.

    Attributes:
        make: what makes it from its sources. It holds none of them itself: they are freed as the
            backward pass goes on.
        users: how many backward passes through maps that read it are to come.
        held: what the first of them made, for the others.
    """

    make: Make
    users: int = 0
    held: Tensor | None = None

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        """The tensor, from its sources as autograd has kept them; the last user lets it go."""
        x = self.make(*sources) if self.held is None else self.held
        self.users -= 1
        self.held = x if self.users > 0 and not torch.is_grad_enabled() else None
        return x


def remade(x: Tensor) -> tuple[Remade, Sequence[Tensor]] | None:
    """How `x` is made again, and from what that its operation keeps; None where that is not known.

    All that read one tensor get one object. Where hooks change what is kept (checkpoints, tensors
    moved to the host), it is left to them.
    """
    node: Any = x.grad_fn
    operation = _OPERATIONS.get(type(node).__name__)
    if operation is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    make, sources = operation(node)
    there = [source for source in sources if source is not None]
    if len(there) < len(sources):
        return None
    shared: Remade = node.metadata.setdefault(_KEY, Remade(make))
    shared.users += 1
    return shared, there


def _gelu(node: Any) -> _Operation:
    approximate = node._saved_approximate
    return lambda x: functional.gelu(x, approximate=approximate), (node._saved_self,)


def _silu(node: Any) -> _Operation:
    return functional.silu, (node._saved_self,)


def _product(node: Any) -> _Operation:
    return torch.mul, (node._saved_self, node._saved_other)


def _layer_norm(node: Any) -> _Operation:
    weight, bias = node._saved_weight, node._saved_bias
    axes = tuple(range(-len(node._saved_normalized_shape), 0))

    def make(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # for second derivatives, of mean and scale too
            mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
            scale = (variance + (scale**-2 - variance).detach()).rsqrt()
        y = x.sub(mean).mul_(scale)  # mean and scale are at least fp32
        y = y if weight is None else y.mul_(weight)
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype)

    return make, (node._saved_input, node._saved_result1, node._saved_result2)


_OPERATIONS: Mapping[str, Callable[[Any], _Operation]] = {
    "GeluBackward0": _gelu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": _silu,
}
