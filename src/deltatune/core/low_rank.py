"""A frozen linear map with low-rank differences beside it, as one step of the graph.

    y = x Wᵀ + b,   y[:, slice] += drop(x) Aᵀ Bᵀ   for each difference

Plain autograd makes and adds a tensor of the size of y for each difference, and one of the size of
x in the backward pass; here both are added in place, inside the products. Of the inputs x alone is
kept, once for all differences, and once for all maps that read it, unless it can be made again from
what is kept anyway; the inner products and what dropout left of x are computed again. So is W,
where it is kept quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.dropout import Mask
from deltatune.core.remade import Remade, remade

__all__ = ["Difference", "Weight", "followed", "linear_with"]

#: A frozen matrix, or what makes one in the dtype that it is given, at every use anew.
Weight: TypeAlias = Tensor | Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Difference:
    """One low-rank difference.

    Attributes:
        A: [rank, inputs], or [slots, rank, inputs] where the rows of a batch are so many equal
            groups.
        B: [outputs, rank], or [slots, outputs, rank].
        start, stop: the features of y that it adds to.
        mask: dropout of its input, None for none.
    """

    A: Tensor
    B: Tensor
    start: int
    stop: int
    mask: Mask | None


def followed() -> bool:
    """Whether a compiler or a transform of torch.func follows every operation.

    A compiler joins them itself, and a transform cannot look into an autograd function.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def linear_with(
    x: Tensor, W: Weight, b: Tensor | None, differences: Sequence[Difference]
) -> Tensor:
    """The output of a frozen linear map with its differences.

    Args:
        x: [rows, ..., inputs].
        W: [outputs, inputs]. Neither it nor b gets a gradient.
        b: [outputs].
        differences: what is added.
    """
    factors = [factor for one in differences for factor in (one.A, one.B)]
    parts = tuple((one.start, one.stop, one.mask) for one in differences)
    again = remade(x) if factors and torch.is_grad_enabled() else None
    y: Tensor = _LinearWith.apply(parts, again, x, W, b, *factors)  # type: ignore[no-untyped-call]
    return y


class _LinearWith(torch.autograd.Function):
    @staticmethod
    def forward(
        parts: tuple[tuple[int, int, Mask | None], ...],
        again: tuple[Remade, Sequence[Tensor]] | None,
        x: Tensor,
        W: Weight,
        b: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        del again
        y = functional.linear(x, _matrix(W, x), b)
        for (start, stop, mask), A, B in zip(parts, factors[::2], factors[1::2], strict=True):
            read = _grouped(x if mask is None else mask.times(x), A)
            _add_product(_grouped(y, A)[..., start:stop], read @ A.mT, B.mT)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.parts, again, x, W, _, *factors = inputs
        ctx.make = None if isinstance(W, Tensor) else W
        ctx.again, sources = again or (None, [x if factors else None])
        ctx.count = len(factors)
        ctx.save_for_backward(*factors, W if isinstance(W, Tensor) else None, *sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        factors, W, sources = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1 :]
        x = sources[0] if ctx.again is None else ctx.again.take(sources)
        g = gradients[0].contiguous()
        dx = g @ _matrix(ctx.make or W, g) if ctx.needs_input_grad[2] else None
        found: list[Tensor] = []
        for (start, stop, mask), A, B in zip(ctx.parts, factors[::2], factors[1::2], strict=True):
            read = _grouped(x if mask is None else mask.times(x, hold=dx is not None), A)
            part = _grouped(g, A)[..., start:stop]
            inner = part @ B
            found += [inner.mT @ read, part.mT @ (read @ A.mT)]
            if dx is None:
                continue
            if mask is None:
                _add_product(_grouped(dx, A), inner, A)
            else:
                dx = dx.add_(mask.times((inner @ A).view(x.shape)))
        return None, None, dx, None, None, *found


def _matrix(W: Weight, like: Tensor) -> Tensor:
    return W if isinstance(W, Tensor) else W(like.dtype)


def _grouped(tensor: Tensor, factor: Tensor) -> Tensor:
    """[tokens, features], or [slots, tokens, features] where the factor has a slot axis."""
    return tensor.reshape(*factor.shape[:-2], -1, tensor.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in place."""
    if total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)
