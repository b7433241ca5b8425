"""Fitting: one pass over the training data gathers the curvature of every leaf."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.core.in_place import InPlaceBank
from deltatune.laplace.curvature import Gathered, matrix_shape
from deltatune.laplace.posterior import Posterior
from deltatune.laplace.rows import Batch, Read, copies, gradients, logits_of, outputs, pieces

__all__ = ["Structure", "fit"]

Structure = Literal["kronecker", "diagonal"]


def fit(
    delta: Delta,
    batches: Iterable[Batch],
    *,
    slot: int = 0,
    structure: Structure = "kronecker",
    rank: int | None = None,
    precision: float | None = None,
    noise: float | None = None,
    together: int = 8,
    read: Read = logits_of,
) -> Posterior:
    """The Laplace approximation of the posterior over the trained leaves of one slot.

    The curvature is the generalised Gauss-Newton matrix, block by block of leaves: Σ Jᵀ Λ J over
    rows, J the gradients of the logits and Λ their curvature of the loss. The prior is N(0, I / λ)
    over all leaves. The authors factorise by inputs and gradients of each map, token by token;
    here by the rows' whole gradients, which serves every leaf, whatever it does. The leaves should
    be a minimum of the loss; the linearised posterior asks no more.

    Args:
        delta: attached alone to its model, and trained.
        batches: of the training data: keyword arguments of the model, of equal first dimensions.
            Labels may be there and are not looked at.
        slot: which of its slots.
        structure: "kronecker", or "diagonal" for single entries.
        rank: a side of a Kronecker product that is wider keeps so many directions, as the authors
            do with 10; None keeps all.
        precision: λ; None takes that of the largest marginal likelihood, which is too small where
            rows are few: compare others on validation rows, by `Posterior.at`.
        noise: for a regression, the variance of its labels; None for classes.
        together: rows of one pass of the model, each with a copy of the leaves.
        read: takes logits [rows, classes] from what the model gives; for an answer in words, those
            of the label words.

    Raises:
        ConfigurationError: a rank, precision or noise that cannot be, no rows, or logits of another
            form.
        UnknownNameError: there is no such structure.
        StateError: the delta is not attached, merged, or not alone.
        UnsupportedError: it trains the backbone itself.
    """
    if structure not in get_args(Structure):
        raise UnknownNameError("structure", structure, get_args(Structure))
    if isinstance(delta.bank, InPlaceBank):
        raise UnsupportedError(f"{delta.name} trains the backbone itself. Give it a delta.")
    if (rank is not None and rank < 1) or (noise is not None and noise <= 0) or together < 1:
        raise ConfigurationError(
            "rank and together are at least 1 and noise is above 0; found "
            f"rank={rank}, together={together}, noise={noise}."
        )
    gathered = {
        name: Gathered(matrix_shape(shape), diagonal=structure == "diagonal", rank=rank)
        for name, shape in delta.bank.trained.items()
    }
    seen = 0
    with copies(delta, slot, together) as copy:
        for batch in batches:
            for piece in pieces(batch, together):
                logits = outputs(copy, piece, read)
                seen += len(logits)
                for along in _roots(logits.detach(), noise):
                    for name, found in gradients(copy, logits, along).items():
                        gathered[name].add(found.reshape(-1, *matrix_shape(found.shape[1:])))
    if not seen:
        raise ConfigurationError("A posterior needs rows of training data; there are none.")
    blocks = {name: one.block() for name, one in gathered.items()}
    made = Posterior(delta, slot, blocks, precision or 1.0, noise, seen, together, read)
    return made.best() if precision is None else made.at(precision)


def _roots(logits: Tensor, noise: float | None) -> Iterator[Tensor]:
    """Columns [rows, classes] of a root of Λ: diag(p) - p pᵀ, or I / noise."""
    eye = torch.eye(logits.shape[1], device=logits.device)
    if noise is not None:
        yield from (one.expand(logits.shape) / noise**0.5 for one in eye)
        return
    p = logits.softmax(-1)
    for k, one in enumerate(eye):
        yield p[:, k : k + 1].sqrt() * (one - p)
