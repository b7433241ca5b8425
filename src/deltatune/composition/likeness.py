"""How alike two deltas are, and which of several a new task may begin from.

Prompts are compared as SPoT retrieves them (Vu et al. 2022, arXiv:2110.07904): cos(mean P_a,
mean P_b), of the mean tokens, or the mean of cos(P_a[i], P_b[j]) over all pairs of tokens. What
folds into weights is compared by the cosine of the effective changes, <Δ_a, Δ_b> / |Δ_a| |Δ_b|,
which does not depend on the factors that a change was trained in. 1 for a delta and itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltatune.composition.change import Change, Product, effective, is_product
from deltatune.composition.members import Member, Source, members_of, model_of
from deltatune.core.artefact import read, read_listed, stored_tensors
from deltatune.core.description import Artefact
from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse
from deltatune.core.method import Method

__all__ = ["nearest", "similarity", "stored_similarity"]

Parts = Mapping[str, Tensor | Product]


def similarity(a: Source, b: Source, *, pairs: bool = False) -> float:
    """The cosine between two deltas, in [-1, 1]; 0 where one of them does nothing.

    Args:
        a, b: deltas, or (delta, slot), of one model: two prompts of any lengths, or two that fold.
            Classifiers beside them are left out.
        pairs: of prompts, the mean over pairs of tokens instead of the cosine of mean tokens.

    Raises:
        ConfigurationError: they belong to different models, or one is a prompt and the other none.
        UnsupportedError: they act on activations otherwise (adapters, prefixes).
    """
    one, other = members_of([a, b])
    model_of([one, other])
    prompts = [_is_prompt(member) for member in (one, other)]
    if all(prompts):
        return _of_tokens(_tokens(one), _tokens(other), pairs=pairs)
    if any(prompts):
        raise ConfigurationError(
            f"{one[0].name} and {other[0].name} cannot be compared: one is a prompt, the other "
            "is not. Compare deltas of one kind."
        )
    return _of_changes(_change(one).parts, _change(other).parts)


def nearest(
    target: Source, sources: Sequence[Source], *, pairs: bool = False
) -> list[tuple[int, float]]:
    """The places of the sources and their similarity to the target, the most alike first.

    The target is trained for a little while before, in which it shows where it goes. What a task
    begins from is then the first, by `core.start.start_from`, or a mean of the best:
    `soup(chosen, weights=similarities)`.

    Raises what `similarity` raises, and ConfigurationError where there is no source.
    """
    found = [similarity(target, source, pairs=pairs) for source in members_of(sources)]
    return sorted(enumerate(found), key=lambda pair: -pair[1])


def stored_similarity(a: str | Path, b: str | Path, *, pairs: bool = False) -> float | None:
    """What `similarity` finds, from two folders of one method and without a model.

    None where that takes the frozen weights (DoRA, masks), of two methods that may change one
    weight, and where nothing can be compared.

    Raises:
        ArtefactError: the files of a folder are damaged.
        ConfigurationError: they hold different methods, or were made for different backbones.
    """
    first, second = read(a), read(b)
    if (first.method, first.backbone.architecture) != (second.method, second.backbone.architecture):
        raise ConfigurationError(
            f"{a} and {b} cannot be compared: {first.method} and {second.method}, for "
            f"{first.backbone.kind} and {second.backbone.kind}."
        )
    one, other = _stored(Path(a), first), _stored(Path(b), second)
    if one is None or other is None:
        return None
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _of_tokens(one, other, pairs=pairs)
    assert not isinstance(one, Tensor) and not isinstance(other, Tensor)  # they are of one method
    return _of_changes(one, other)


def _stored(folder: Path, artefact: Artefact) -> Tensor | Parts | None:
    """The tokens of a prompt, or the products that a folder's factors make."""
    sites: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in read_listed(folder, artefact).items():
        owner, _, rest = name.partition("/")
        path, _, leaf = rest.rpartition("/")
        sites[owner][path][leaf] = value
    methods = [method for method in parse(artefact.method) if method.category != "head"]
    if {method.face for method in methods} == {"embed"}:
        held = [own for method in methods for own in sites[method.name].values()]
        return torch.cat([value for own in held for value in own.values()]).double()
    if len(methods) != 1 or not is_product(methods[0]):
        return None
    products = {}
    for path, own in sites[methods[0].name].items():
        A, B = methods[0].factors(own)
        products[path] = Product(B, A)
    return products


def _methods(member: Member) -> list[Method]:
    """What a member consists of, classifiers aside."""
    delta, slot = member
    return [method for method in delta.expressions[slot] if method.category != "head"]


def _change(member: Member) -> Change:
    delta, slot = member
    return effective(delta, slot, methods=[method.name for method in _methods(member)])


def _is_prompt(member: Member) -> bool:
    return {method.face for method in _methods(member)} == {"embed"}


def _tokens(member: Member) -> Tensor:
    """The virtual tokens of a prompt as they are stored, [length, width]."""
    delta, slot = member
    heads = {
        name
        for part in delta.parts
        if part.method.category == "head"
        for names in part.names
        for name in names.values()
    }
    held = stored_tensors(delta, slot)
    return torch.cat([value.double() for name, value in held.items() if name not in heads])


def _of_tokens(a: Tensor, b: Tensor, *, pairs: bool) -> float:
    if pairs:
        return float((normalize(a, dim=1) @ normalize(b, dim=1).mT).mean())
    return float(normalize(a.mean(0), dim=0) @ normalize(b.mean(0), dim=0))


def _of_changes(a: Parts, b: Parts) -> float:
    norms = (_inner(a, a) * _inner(b, b)) ** 0.5
    return _inner(a, b) / norms if norms else 0.0


def _inner(a: Parts, b: Parts) -> float:
    """<Δ_a, Δ_b>; of two products without multiplying them out."""
    total = 0.0
    for name in a.keys() & b.keys():
        one, other = a[name], b[name]
        if isinstance(one, Product) and isinstance(other, Product):
            left = one.left.double().mT @ other.left.double()
            total += float((left * (one.right.double() @ other.right.double().mT)).sum())
        else:
            total += float((_dense(one) * _dense(other)).sum())
    return total


def _dense(part: Tensor | Product) -> Tensor:
    return (part.dense() if isinstance(part, Product) else part).double()
