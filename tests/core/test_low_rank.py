"""The road of low-rank differences equals the plain one, gradients too, whatever the shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from deltatune import api
from deltatune.core.dropout import Mask, drop
from deltatune.core.low_rank import Difference, linear_with
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

SIZES = st.integers(1, 6)


def draw(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


@settings(deadline=None, max_examples=60)
@given(
    slots=st.integers(0, 3),
    rows=SIZES,
    tokens=SIZES,
    widths=st.tuples(SIZES, SIZES, SIZES),
    rate=st.sampled_from([0.0, 0.3]),
    shares=st.integers(1, 3),
    bias=st.booleans(),
)
def test_it_equals_the_plain_road(
    slots: int,
    rows: int,
    tokens: int,
    widths: tuple[int, int, int],
    rate: float,
    shares: int,
    bias: bool,
) -> None:
    inputs, outputs, rank = widths
    rows *= max(slots, 1)
    stack = (slots,) if slots else ()
    x = draw(rows, tokens, inputs, seed=0)
    W = draw(shares * outputs, inputs, seed=1).detach()
    b = draw(shares * outputs, seed=2).detach() if bias else None
    factors = [
        (draw(*stack, rank, inputs, seed=3 + k), draw(*stack, outputs, rank, seed=9 + k))
        for k in range(shares)
    ]

    def masks() -> list[Mask | None]:
        everyone = list(range(rows))
        return [Mask(rate, [((k,), everyone)]) if rate else None for k in range(shares)]

    def plain() -> Tensor:
        y = torch.nn.functional.linear(x, W, b)
        parts = []
        for (A, B), mask in zip(factors, masks(), strict=True):
            read = (x if mask is None else mask.times(x)).reshape(*stack, -1, inputs)
            parts.append(((read @ A.mT) @ B.mT).view(rows, tokens, outputs))
        return y + torch.cat(parts, dim=-1)

    def at_once() -> Tensor:
        ranges = [(k * outputs, (k + 1) * outputs) for k in range(shares)]
        held = zip(factors, ranges, masks(), strict=True)
        return linear_with(x, W, b, [Difference(*ab, *at, mask) for ab, at, mask in held])

    leaves = [x, *(leaf for pair in factors for leaf in pair)]
    weights = draw(rows, tokens, shares * outputs, seed=7).detach()
    expected, found = plain(), at_once()
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves), wanted, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


NORM = {"weight": draw(6, seed=4).detach(), "bias": draw(6, seed=5).detach()}
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "a product": lambda x: (2 * x) * torch.sin(x),
    "a product with a number": lambda x: x * 0.5,
    "a norm": lambda x: functional.layer_norm(x, (6,), **NORM),
    "a norm without weights": lambda x: functional.layer_norm(x, (6,)),
}


@pytest.mark.parametrize("kind", MADE)
def test_an_input_that_is_made_again_gives_the_same_gradients(kind: str) -> None:
    """Three maps read it, as those of queries, keys and values do."""
    source, Ws = draw(4, 3, 6, seed=0), [draw(5, 6, seed=k).detach() for k in (1, 2, 3)]
    factors = [(draw(2, 6, seed=7 + k), draw(5, 2, seed=11 + k)) for k in range(3)]
    leaves = [source, *(leaf for pair in factors for leaf in pair)]

    def total(source: Tensor, *factors: Tensor) -> Tensor:
        x = MADE[kind](source)
        held = zip(Ws, factors[::2], factors[1::2], strict=True)
        each = [linear_with(x, W, None, [Difference(A, B, 0, 5, None)]) for W, A, B in held]
        return torch.stack([y.square().sum() * k for k, y in enumerate(each, 1)]).sum()

    def plain(source: Tensor, *factors: Tensor) -> Tensor:
        x = MADE[kind](source)
        held = zip(Ws, factors[::2], factors[1::2], strict=True)
        each = [functional.linear(x, W + B @ A) for W, A, B in held]
        return torch.stack([y.square().sum() * k for k, y in enumerate(each, 1)]).sum()

    found = torch.autograd.grad(total(*leaves), leaves)
    for mine, theirs in zip(found, torch.autograd.grad(plain(*leaves), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    loss = total(*leaves)
    for _ in range(2):  # a graph that is gone through twice
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        for mine, theirs in zip(again, found, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(total, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_an_activation_or_a_norm_is_not_kept(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(2, 64, dtype=dtype)
    W, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((64, 64), (2, 64), (64, 2)))
    A.requires_grad_()
    source = torch.randn(8, 64, dtype=dtype, requires_grad=True)
    norm = functional.layer_norm(source * 1, (64,), weight, bias)
    made = functional.gelu(linear_with(norm, W, None, [Difference(A, B, 0, 64, None)]))
    out = linear_with(made, W, None, [Difference(A, B, 0, 64, None)])
    nodes = [out.grad_fn, made.grad_fn.next_functions[0][0]]  # type: ignore[union-attr]
    kept = {t.data_ptr() for node in nodes for t in node.saved_tensors}  # type: ignore[union-attr]
    assert norm.data_ptr() not in kept and made.data_ptr() not in kept
    found = torch.autograd.grad(out.float().square().sum(), (source, A))
    plain = functional.layer_norm(source, (64,), weight, bias)
    for _ in range(2):
        plain = (
            functional.linear(functional.gelu(plain) if _ else plain, W)
            + ((functional.gelu(plain) if _ else plain) @ A.mT) @ B.mT
        )
    wanted = torch.autograd.grad(plain.float().square().sum(), (source, A))
    for mine, theirs in zip(found, wanted, strict=True):
        scale = theirs.float().norm()
        assert (mine.float() - theirs.float()).norm() < scale * (
            0.05 if dtype is torch.bfloat16 else 1e-5
        )


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=4),
    tokens=SIZES,
    rate=st.sampled_from([0.0, 0.3]),
)
def test_groups_of_any_sizes_equal_calls_of_their_own(
    sizes: list[tuple[bool, int]], tokens: int, rate: float
) -> None:
    rows, slots = sum(size for _, size in sizes), sum(used for used, _ in sizes)
    places = iter(range(slots))
    runs = tuple((next(places) if used else None, size) for used, size in sizes)
    x, W = draw(rows, tokens, 4, seed=0), draw(5, 4, seed=1).detach()
    A, B = draw(slots, 2, 4, seed=2), draw(slots, 3, 2, seed=3)

    def mask() -> Mask | None:
        return Mask(rate, [((0,), list(range(rows)))]) if rate else None

    def apart() -> Tensor:
        pieces, read = [], x if (dropped := mask()) is None else dropped.times(x)
        for (place, size), part in zip(runs, read.split([size for _, size in runs]), strict=True):
            zeros = part.new_zeros(size, tokens, 3)
            pieces.append(zeros if place is None else part @ A[place].mT @ B[place].mT)
        return functional.linear(x, W) + functional.pad(torch.cat(pieces), (1, 1))

    made = linear_with(x, W, None, [Difference(A, B, 1, 4, mask(), runs)])
    wanted = apart()
    torch.testing.assert_close(made, wanted)
    held = (x, A, B) if slots else (x,)
    found = torch.autograd.grad(made.square().sum(), held)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), held))


def test_hooks_on_what_is_kept_see_the_input() -> None:
    """Checkpoints and tensors that are moved to the host decide themselves."""
    x = functional.gelu(draw(3, 4, seed=0))
    W, A, B = draw(5, 4, seed=1).detach(), draw(2, 4, seed=2), draw(5, 2, seed=3)
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.data_ptr()) or t, lambda t: t
    ):
        linear_with(x, W, None, [Difference(A, B, 0, 5, None)])
    assert x.data_ptr() in seen


def test_its_second_derivatives_are_right() -> None:
    x, W = draw(3, 2, 4, seed=0), draw(5, 4, seed=1).detach()
    A, B = draw(2, 4, seed=2), draw(5, 2, seed=3)
    mask = Mask(0.3, [((1,), [0, 1, 2])])

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear_with(x, W, None, [Difference(A, B, 0, 5, mask)])

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


def test_transforms_of_torch_take_the_plain_road() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5)).requires_grad_(False)
    x = torch.randn(3, 2, 4)
    delta = api.attach(model, "lora(rank=2, at='0')")
    move(delta)

    def loss(x: Tensor) -> Tensor:
        found: Tensor = model(x).square().sum()
        return found

    wanted = torch.autograd.functional.jacobian(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    each = torch.func.vmap(torch.func.grad(lambda row: loss(row[None])))(x)
    torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_map_that_is_unfrozen_by_hand_gets_its_gradient(name: str) -> None:
    kin = FAMILIES["bert"]
    model = kin.build()
    delta = api.attach(model, "lora(rank=2)")
    parameter = model.get_parameter(f"bert.encoder.layer.0.attention.self.query.{name}")
    parameter.requires_grad_()
    move(delta)
    kin.logits(model, kin.batch()).square().sum().backward()
    assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_dropout_keeps_the_input_and_nothing_else() -> None:
    x, A = draw(4, 8, 16, seed=0), draw(3, 16, seed=1)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    mask = Mask(0.25, [((5,), [0, 1, 2, 3])])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held),
        drop(x, mask) as read,
    ):
        out = read @ A.mT
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert kept <= {t.untyped_storage().data_ptr() for t in (x, A)}
    found = torch.autograd.grad(out.square().sum(), (x, A))
    plain = mask.times(x) @ A.mT
    for mine, theirs in zip(found, torch.autograd.grad(plain.square().sum(), (x, A)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_input_changed_in_place_is_noticed() -> None:
    x, A = draw(2, 3, seed=0), draw(2, 3, seed=1)
    y = x * 1
    with drop(y, Mask(0.5, [((0,), [0, 1])])) as read:
        out = read @ A.mT
    y.add_(1)
    try:
        out.sum().backward()
    except RuntimeError as error:
        assert "in place" in str(error)
    else:
        raise AssertionError("a changed input went unnoticed")


@settings(deadline=None, max_examples=25)
@given(rate=st.floats(0.01, 0.95), seed=st.integers(0, 1000))
def test_what_is_kept_has_the_mean_of_the_input(rate: float, seed: int) -> None:
    x = torch.ones(2, 20_000, dtype=torch.float64)
    kept = Mask(rate, [((seed,), [0, 1])]).times(x)
    share = float((kept == 0).double().mean())
    tolerance = 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs(share - rate) < tolerance + 1 / 65536
    assert abs(float(kept.mean()) - 1) < tolerance / (1 - rate) + 1e-4
