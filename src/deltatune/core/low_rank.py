"""A frozen linear map with low-rank differences beside it, as one step of the graph.

    y = x Wᵀ + b,   y[:, slice] += drop(x) Aᵀ Bᵀ   for each difference

Plain autograd makes and adds a tensor of the size of y for each difference, and one of the size of
x in the backward pass; here both are added in place, inside the products. Of the inputs x alone is
kept, once for all differences, and once for all maps that read it, unless it can be made again from
what is kept anyway; the inner products and what dropout left of x are computed again. So is W,
where it is kept quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from deltatune.core.dropout import Mask
from deltatune.core.remade import Remade, remade
from deltatune.core.rows import Runs

__all__ = ["Difference", "Weight", "followed", "linear_with"]

#: A frozen matrix, or what makes one in the dtype that it is given, at every use anew.
Weight: TypeAlias = Tensor | Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Difference:
    """One low-rank difference.

    Attributes:
        A: [rank, inputs], or [slots, rank, inputs] where the rows of a batch are groups.
        B: [outputs, rank], or [slots, outputs, rank].
        start, stop: the features of y that it adds to.
        mask: dropout of its input, None for none.
        runs: the groups, in order; None where they are of one size and each has a slot.
    """

    A: Tensor
    B: Tensor
    start: int
    stop: int
    mask: Mask | None
    runs: Runs | None = None


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
    parts = tuple((one.start, one.stop, one.mask, one.runs) for one in differences)
    again = remade(x) if factors and torch.is_grad_enabled() else None
    y: Tensor = _LinearWith.apply(parts, again, x, W, b, *factors)  # type: ignore[no-untyped-call]
    return y


class _LinearWith(torch.autograd.Function):
    @staticmethod
    def forward(
        parts: tuple[tuple[int, int, Mask | None, Runs | None], ...],
        again: tuple[Remade, Sequence[Tensor]] | None,
        x: Tensor,
        W: Weight,
        b: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        del again
        y = functional.linear(x, _matrix(W, x), b)
        for (start, stop, mask, runs), A, B in zip(parts, factors[::2], factors[1::2], strict=True):
            read = x if mask is None else mask.times(x)
            for k, of_x, of_y in _groups(runs, A, read, y):
                _add_product(of_y[..., start:stop], of_x @ A[k].mT, B[k].mT)
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
        pairs = zip(ctx.parts, factors[::2], factors[1::2], strict=True)
        for (start, stop, mask, runs), A, B in pairs:
            read = x if mask is None else mask.times(x, hold=dx is not None)
            into = dx if mask is None or dx is None else _room(dx, runs)
            of_A, of_B = torch.empty_like(A), torch.empty_like(B)
            found += [of_A, of_B]
            each = (read, g) if into is None else (read, g, into)
            for k, of_x, of_g, *of_dx in _groups(runs, A, *each):
                part = of_g[..., start:stop]
                inner = part @ B[k]
                of_A[k] = inner.mT @ of_x
                of_B[k] = part.mT @ (of_x @ A[k].mT)
                if of_dx:
                    _add_product(of_dx[0], inner, A[k], beta=1 if mask is None else 0)
            if mask is not None and dx is not None and into is not None:
                dx = dx.add_(mask.times(into))
        return None, None, dx, None, None, *found


def _matrix(W: Weight, like: Tensor) -> Tensor:
    return W if isinstance(W, Tensor) else W(like.dtype)


def _groups(runs: Runs | None, factor: Tensor, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """What is computed by one product: an index of the factors, and views of the tensors.

    They are [tokens, features], or [slots, tokens, features] where groups are of one size.
    """
    if runs is None:
        yield (..., *(one.reshape(*factor.shape[:-2], -1, one.shape[-1]) for one in tensors))
        return
    flat = [one.reshape(-1, one.shape[-1]) for one in tensors]
    each = len(flat[0]) // sum(size for _, size in runs)
    pieces = (torch.split(one, [size * each for _, size in runs]) for one in flat)
    for (place, _), *parts in zip(runs, *pieces, strict=True):
        if place is not None:
            yield (place, *parts)


def _room(like: Tensor, runs: Runs | None) -> Tensor:
    """A tensor to write all groups into; zero where rows have no delta."""
    every = runs is None or all(place is not None for place, _ in runs)
    return torch.empty_like(like) if every else torch.zeros_like(like)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, beta: int = 1) -> None:
    """Adds left @ right to `total` in place; with `beta` 0 whatever was there is gone."""
    if total.dim() == 2:
        total.addmm_(left, right, beta=beta)
    else:
        total.baddbmm_(left, right, beta=beta)
