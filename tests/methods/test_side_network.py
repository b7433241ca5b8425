"""Ladder side-tuning: the formula in float64 numpy, blocks without a graph, both stacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltatune import api
from deltatune.core.errors import ConfigurationError, StateError, TargetError
from deltatune.core.trunk import Trunk
from deltatune.testing.case import Case, close, close_gradients, move
from deltatune.testing.compiled_laws import law_compiled
from deltatune.testing.families import FAMILIES

LST = "lst(reduction=4, heads=2)"


class Seen:
    """What a module of a model is called with, and what it gives."""

    def __init__(self, module: nn.Module) -> None:
        self.x = self.y = torch.empty(0)
        module.register_forward_hook(self.see, with_kwargs=True)

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]
        self.y = output[0] if isinstance(output, tuple) else output


def normed(s: Any, gain: Any) -> Any:
    return gain * s / np.sqrt((s**2).mean(-1, keepdims=True) + 1e-6)


def attention(q: Any, k: Any, v: Any, sees: Any) -> Any:
    read = np.zeros_like(q)
    width = q.shape[-1] // 2
    for head in range(2):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].swapaxes(-1, -2) / width**0.5
        weights = np.exp(np.where(sees, scores, -np.inf))
        read[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    return read


def climbed(
    seen: list[Seen], leaves: list[dict[str, Any]], sees: Any, source: Any = None, read: Any = None
) -> Any:
    """The state of a ladder behind its last block."""
    s = seen[0].x.numpy() @ leaves[0]["R_0"].T
    for one, p in zip(seen, leaves, strict=True):
        g = 1 / (1 + np.exp(-p["gate"] / 0.1))
        s = g * s + (1 - g) * one.y.numpy() @ p["R"].T
        q, k, v = np.split(normed(s, p["n_1"]) @ p["qkv"].T, 3, axis=-1)
        s = s + attention(q, k, v, sees) @ p["o"].T
        if source is not None:
            k, v = np.split(source @ p["KV"].T, 2, axis=-1)
            s = s + attention(normed(s, p["n_3"]) @ p["Q"].T, k, v, read) @ p["C"].T
        s = s + np.maximum(normed(s, p["n_2"]) @ p["D"].T, 0) @ p["E"].T
    return s


def blocks_of(model: Any, family: str) -> list[nn.Module]:
    if family == "t5":
        return [*model.encoder.block, *model.decoder.block]
    return list(model.bert.encoder.layer if family == "bert" else model.model.layers)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_formula(family: str) -> None:
    model = FAMILIES[family].build().requires_grad_(False).double()
    batch = FAMILIES[family].batch()
    seen = [Seen(block) for block in blocks_of(model, family)]
    delta = api.attach(model, LST)
    move(delta)
    held = {name: value.double().numpy() for name, value in delta.tensors().items()}
    names = delta.parts[0].names
    leaves = [{leaf: held[full] for leaf, full in each.items()} for each in names]
    with delta.active(False):
        model(**batch)
    real = batch["attention_mask"].bool().numpy()[:, None, :]
    sees = real | np.eye(7, dtype=bool)
    if family == "bert":
        s = climbed(seen, leaves, sees)
    elif family == "llama":
        s = climbed(seen, leaves, np.tril(sees))
    else:
        source = climbed(seen[:2], leaves[:2], sees)
        s = climbed(seen[2:], leaves[2:], np.tril(np.ones((4, 4), dtype=bool)), source, real)
    plain = [one.y.numpy() for one in seen]
    with torch.no_grad():
        model(**batch)
    for one, before in zip(seen[:-1], plain[:-1], strict=True):
        assert np.array_equal(one.y.numpy(), before)
    expected = plain[-1] + normed(s, leaves[-1]["n"]) @ leaves[-1]["U"].T
    kept = np.ones_like(expected[..., 0], dtype=bool) if family == "t5" else real[:, 0]
    np.testing.assert_allclose(seen[-1].y.numpy()[kept], expected[kept], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_no_gradient_goes_through_the_blocks(family: str) -> None:
    kept: list[tuple[int, ...]] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    case = Case(LST, family)
    with case.attached() as (model, delta):
        seen = [Seen(block) for block in blocks_of(model, family)]
        inner = [Seen(m) for m in model.modules() if isinstance(m, nn.Linear)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            logits = case.kin.logits(model, case.kin.batch())
        assert all(one.y.grad_fn is None for one in seen[:-1])
        assert seen[-1].y.grad_fn is not None and seen[-1].x.grad_fn is None
        graphs = sum(one.y.grad_fn is not None for one in inner)
        assert graphs <= (2 if family == "bert" else 1)  # pooler and classifier, or head
        # The feed-forwards of the base are 48 wide, those of the side network 32.
        assert kept and not any(48 in shape for shape in kept)
        torch.autograd.backward(logits.square().sum())
        row = delta.bank.slots[0]
        assert row.grad is not None and bool(row.grad.abs().sum() > 0)


def test_less_is_kept_than_for_adapters() -> None:
    def kept(method: str) -> int:
        total = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal total
            total += value.numel()
            return value

        case = Case(method, "bert")
        with (
            case.attached() as (model, _),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        ):
            case.kin.logits(model, case.kin.batch(rows=16))
        return total

    assert kept("lst(reduction=8, heads=2)") < kept("adapter(bottleneck=4)")


def test_the_trunk_sees_what_lies_below_the_first_rung() -> None:
    case = Case("lst(reduction=4, heads=2, at='block[1].residual')", "llama")
    with case.attached() as (model, _):
        trunk, batch = Trunk(model), case.kin.batch()
        expected = model(**batch).logits
        found: list[Tensor] = []

        def whole(inner: Any, args: Any, kwargs: Any) -> Any:
            output = trunk.above(inner, kwargs, trunk.reach(inner, kwargs))
            found.append(output.logits)
            return output

        with trunk.installed(whole):
            model(**batch)
        assert trunk.below == ["model.layers.0"]
        assert torch.equal(found[0], expected)


def test_an_encoder_may_be_called_first() -> None:
    case = Case(LST, "t5")
    batch = case.kin.batch()
    text = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    with case.attached() as (model, delta):
        expected = model(**text, **batch).logits
        encoded: Any = model.get_encoder()(**text)
        other: Any = model.get_encoder()(**{name: value[:1] for name, value in text.items()})
        mask = text["attention_mask"]
        found = model(encoder_outputs=encoded, attention_mask=mask, **batch).logits
        assert torch.equal(found, expected)
        gradients = []
        for logits in (found, expected):
            row = delta.bank.slots[0]
            gradients.extend(torch.autograd.grad(logits.square().sum(), row))
        close_gradients(*gradients)
        del other
        with pytest.raises(StateError, match="hold nothing of it"):
            model(encoder_outputs=(encoded[0],), attention_mask=mask, **batch)
        with delta.active(False):
            plain: Any = model.get_encoder()(**text)
            assert set(plain) == {"last_hidden_state"} < set(encoded)
        with pytest.raises(StateError, match="while the delta is attached and on"):
            model(encoder_outputs=plain, attention_mask=mask, **batch)


def test_a_ladder_beside_a_decoder_alone_reads_no_encoder() -> None:
    case = Case("lst(reduction=4, heads=2, at='decoder.residual')", "t5")
    with case.attached() as (model, delta):
        assert not any(leaf.endswith(("/Q", "/KV")) for leaf in delta.tensors())
        encoded: Any = model.get_encoder()(**{"input_ids": case.kin.batch()["input_ids"]})
        assert set(encoded) == {"last_hidden_state"}
        batch = case.kin.batch()
        assert case.kin.logits(model, batch).grad_fn is not None


def test_rows_of_several_slots_generate_as_alone() -> None:
    case = Case(LST, "t5")
    batch = {k: v for k, v in case.kin.batch().items() if k != "decoder_input_ids"}
    with case.attached(slots=2) as (model, delta):
        with delta.route([1, None, 0, 1]):
            mixed = case.generate(model, **batch, num_beams=2)
        for row, slot in enumerate([1, None, 0, 1]):
            with delta.route([slot] * 4):
                assert torch.equal(case.generate(model, **batch, num_beams=2)[row], mixed[row])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_before_one_backward_pass_keep_their_states(reentrant: bool) -> None:
    case = Case(LST, "t5")
    batches = [case.kin.batch(seed=seed) for seed in (0, 1)]
    gradients: list[Tensor] = []
    for checkpointed in (False, True):
        with case.attached() as (model, delta):
            model.train()
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()  # type: ignore[no-untyped-call]
            loss = sum(case.kin.logits(model, batch).square().sum() for batch in batches)
            assert isinstance(loss, Tensor)
            torch.autograd.backward(loss)
            row = delta.bank.slots[0]
            assert row.grad is not None
            gradients.append(row.grad)
    close_gradients(gradients[1], gradients[0])


def test_two_ladders_do_not_mix() -> None:
    """Beside one that adds nothing yet, another adds what it adds alone."""
    case = Case(LST, "llama")
    with case.attached() as (model, _):
        expected = case.logits(model)
        api.attach(model, LST, seed=5)
        close(case.logits(model), expected)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("lst(reduction=0)", ConfigurationError),
        ("lst(reduction=3)", TargetError),
        ("lst(reduction=8, heads=3)", TargetError),
        ("lst(reduction=64)", TargetError),
    ],
)
def test_what_cannot_be_meant_is_refused(method: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="reduction"):
        api.plan(FAMILIES["bert"].build(), method)


def test_one_graph_compiled_before_the_delta_came(tmp_path: Path) -> None:
    law_compiled(Case(LST, "bert"), tmp_path)
