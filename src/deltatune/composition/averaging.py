"""Means of leaves: AdapterSoup and MerA, for what acts on activations and cannot be folded.

The mean of two adapters' tensors means something where both are near one solution: the same
backbone, the same expression, and the same start, from which both were trained. From different
starts their hidden units come in different orders, and the mean is of units that do different
things; MerA puts them into one order first. The kernel cannot see how a loaded delta started;
models, expressions and leaves that are not trained are compared.

A delta that folds has an exact mean, that of effective changes; the mean of its leaves is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.composition.arithmetic import shares
from deltatune.composition.libraries import library
from deltatune.composition.members import Member, Source, members_of, model_of, resting
from deltatune.core.artefact import stored_tensors
from deltatune.core.attaching import attach
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, UnsupportedError
from deltatune.core.grammar import Expression
from deltatune.core.in_place import InPlaceBank
from deltatune.core.layout import Part
from deltatune.primitives.bottleneck import Bottleneck

__all__ = ["Selected", "mera", "soup", "soup_by_score"]

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Selected:
    """A soup that was chosen by a score.

    Attributes:
        delta: the mean of the chosen, attached.
        chosen: places of the chosen in what was given, the best first.
        score: of the mean.
        scores: of each delta alone, in the order given.
    """

    delta: Delta
    chosen: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def soup(deltas: Sequence[Source], weights: Sequence[float] | None = None) -> Delta:
    """A new delta whose leaves are the mean of others', AdapterSoup; one forward pass for all.

    Chronopoulou et al. 2023, arXiv:2302.07027. What is averaged are the leaves that an artefact
    holds: a prefix, not the map that made it.

    Args:
        deltas: deltas, or (delta, slot), of one model, one expression and one start.
        weights: one for each, none of them negative; None for equal ones.

    Returns the new delta, attached beside the others; switch those off or detach them.

    Raises:
        ConfigurationError: different models or expressions, or weights of no mean.
        UnsupportedError: all parts fold, or leaves that are not trained (places, projections,
            masks) differ.
    """
    members = members_of(deltas)
    parts = shares(weights, len(members))
    with _fresh(members) as made:
        made.bank.write(0, _mean(made, _held(members), parts))
    return made


def soup_by_score(
    deltas: Sequence[Source], score: Callable[[Delta], float], *, most: int | None = None
) -> Selected:
    """A soup of those deltas that help it, by a score on data held out.

    Greedy, as Wortsman et al. 2022, arXiv:2203.05482: the best alone, then each in the order of
    their own scores, kept where the score of the mean does not fall.

    Args:
        deltas: see `soup`.
        score: of the attached delta that it is called with, larger is better; the members are
            switched off meanwhile. It is called at most twice for each member.
        most: the largest number to choose; None for any.

    Raises what `soup` raises, and ConfigurationError for `most` below 1.
    """
    if most is not None and most < 1:
        raise ConfigurationError(f"most must be at least 1, or None; it is {most}.")
    members = members_of(deltas)
    with _fresh(members) as made:
        held = _held(members)

        def scored(chosen: Sequence[int]) -> float:
            made.bank.write(0, _mean(made, [held[k] for k in chosen], shares(None, len(chosen))))
            with resting(members), torch.no_grad():
                return float(score(made))

        alone = [scored([k]) for k in range(len(members))]
        order = sorted(range(len(members)), key=lambda k: -alone[k])
        chosen, best = order[:1], alone[order[0]]
        for k in order[1:]:
            if most is not None and len(chosen) >= most:
                break
            reached = scored([*chosen, k])
            if reached >= best:
                chosen, best = [*chosen, k], reached
        made.bank.write(0, _mean(made, [held[k] for k in chosen], shares(None, len(chosen))))
    return Selected(made, tuple(chosen), best, tuple(alone))


def mera(deltas: Sequence[Source], weights: Sequence[float] | None = None) -> Delta:
    """A new adapter: the hidden units of others brought into the order of the first, then averaged.

    He et al. 2023, arXiv:2308.15982, aligned by weights: at each site an optimal transport between
    units, the cost being the squared distance of their incoming weights and biases. Between equally
    many units of equal mass the optimal plan is a permutation, which is computed exactly. Parts
    without a bottleneck are averaged as they are.

    Args:
        deltas: see `soup`; their starts may differ. The first is the reference.
        weights: see `soup`.

    Raises what `soup` raises, and UnsupportedError for an expression without bottlenecks D, U.
    """
    members = members_of(deltas)
    factors = shares(weights, len(members))
    with _fresh(members) as made:
        parts = [part for part in made.parts if _has_units(part)]
        if not parts:
            raise UnsupportedError(
                f"mera aligns the hidden units of bottlenecks, and {made.name} has none. "
                "Average what has one start with soup()."
            )
        held = _held(members)
        aligned = [held[0], *(_aligned(parts, held[0], leaves) for leaves in held[1:])]
        made.bank.write(0, _mean(made, aligned, factors))
    return made


@contextmanager
def _fresh(members: Sequence[Member]) -> Iterator[Delta]:
    """A new delta of the members' expression, detached again if what follows fails.

    Raises where a mean of their leaves has no meaning.
    """
    model = model_of(members)
    expressions = dict.fromkeys(delta.expressions[slot] for delta, slot in members)
    if len(expressions) > 1:
        raise ConfigurationError(
            "Leaves can be averaged where they mean the same; found "
            f"{', '.join(map(str, expressions))}. Give deltas of one expression."
        )
    (expression,) = expressions
    folds = all(method.face in ("weight", "select") for method in expression)
    if folds or any(isinstance(delta.bank, InPlaceBank) for delta, _ in members):
        raise UnsupportedError(
            f"{expression} folds into weights, and the mean of its leaves is not the mean of what "
            "it does. That one is exact: as_delta(average([effective(a), effective(b)]))."
        )
    made = attach(model, Expression(tuple(method.stored() for method in expression)))
    try:
        yield made
    except BaseException:
        made.detach()
        raise


def _held(members: Sequence[Member]) -> list[Leaves]:
    """The leaves of each member, as an artefact holds them."""
    with torch.no_grad():
        return [
            {name: value.clone() for name, value in stored_tensors(delta, slot).items()}
            for delta, slot in members
        ]


def _mean(made: Delta, held: Sequence[Leaves], weights: Sequence[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in made.parts:
        for name, leaf in part.leaves.items():
            values = [leaves[name] for leaves in held]
            if leaf.trained:
                found[name] = torch.stack(
                    [w * value for w, value in zip(weights, values, strict=True)]
                ).sum(0)
                continue
            if not all(value.equal(values[0]) for value in values):
                raise UnsupportedError(
                    f"{name} is not trained and differs between the deltas, so that their other "
                    "leaves mean different things. Give deltas of one start (one seed)."
                )
            found[name] = values[0]
    return found


def _has_units(part: Part) -> bool:
    return isinstance(part.method, Bottleneck) and all({"D", "U"} <= set(n) for n in part.names)


def _aligned(parts: Sequence[Part], reference: Leaves, leaves: Leaves) -> Leaves:
    """The leaves of one adapter with its units in the order of the reference."""
    assign = library("scipy.optimize").linear_sum_assignment
    found = dict(leaves)
    for part in parts:
        for names in part.names:
            cost = torch.cdist(_incoming(reference, names), _incoming(leaves, names)).square()
            order = torch.as_tensor(assign(cost.cpu().numpy())[1])
            found[names["D"]] = leaves[names["D"]][order]
            found[names["U"]] = leaves[names["U"]][:, order]
            if "c" in names:
                found[names["c"]] = leaves[names["c"]][order]
    return found


def _incoming(leaves: Leaves, names: Mapping[str, str]) -> Tensor:
    """What each hidden unit reads, [units, inputs] and its bias, in fp64."""
    columns = [leaves[names["D"]]]
    if "c" in names:
        columns.append(leaves[names["c"]].unsqueeze(1))
    return torch.cat(columns, dim=1).double()
