"""Methods that read the text: formulas in float64 numpy, padding, prompts, caches, refusals."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ConfigurationError,
    StateError,
    TargetError,
    UnsupportedError,
)
from deltatune.core.host import host_of
from deltatune.core.text import Text
from deltatune.methods import Invertible, ReFT
from deltatune.methods.reft import _orthonormal
from deltatune.testing.case import Case, close, marks, move, named_gradients
from deltatune.testing.families import FAMILIES

SPECIAL = " ".join(map(str, range(2, 60)))
READERS = (
    "tiny_attention(heads=2)",
    "pals(width=8, heads=2)",
    "lst(reduction=4, heads=2)",
    "reft(rank=2, first=1, last=2)",
    "direft(rank=2, first=2, last=1, separate=True)",
    "noreft(rank=2)",
    f"pasta(length=2, tokens='{SPECIAL}')",
)


def double(family: str) -> Any:
    return FAMILIES[family].build().requires_grad_(False).double()


class Heard:
    """What a module of a model is called with, and what it gives."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.x = self.y = torch.empty(0)
        model.get_submodule(path).register_forward_hook(self.hear, with_kwargs=True)

    def hear(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.x = args[0] if args else next(iter(kwargs.values()))
        self.y = output[0] if isinstance(output, tuple) else output


def heard(family: str, path: str, method: str, batch: dict[str, Tensor]) -> tuple[Any, ...]:
    """x and y of a module without the method, y with it, and the leaves of the one site."""
    model = double(family)
    listener = Heard(model, path)
    with torch.no_grad():
        model(**batch)
        x, y = listener.x.numpy(), listener.y.numpy()
        delta = api.attach(model, method)
        move(delta)
        model(**batch)
    names = delta.parts[0].names[0]
    read = delta.bank.read(0)
    leaves = {leaf: read[full].detach().double().numpy() for leaf, full in names.items()}
    return x, y, listener.y.numpy(), leaves


def attention(shown: Any, mask: Any, heads: int, causal: bool) -> Any:
    """A plain attention, row by row and head by head."""
    q, k, v = np.split(shown, 3, axis=-1)
    rows, tokens, width = q.shape
    each, read = width // heads, np.zeros_like(q)
    for row in range(rows):
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            for t in range(tokens):
                seen = [
                    s for s in range(tokens) if s == t or (mask[row, s] and (s < t or not causal))
                ]
                scores = np.array([q[row, t, part] @ k[row, s, part] for s in seen]) / each**0.5
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                read[row, t, part] = sum(
                    w * v[row, s, part] for w, s in zip(weights, seen, strict=True)
                )
    return read


ATTENTIONS = {
    "bert": ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0"),
    "llama": ("model.layers.0.self_attn.o_proj", "model.layers.0"),
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_tiny_attention(family: str, left: bool) -> None:
    batch = FAMILIES[family].batch(left=left)
    method = "tiny_attention(heads=3, at='block[0].self_attention')"
    _, y, found, p = heard(family, ATTENTIONS[family][0], method, batch)
    mask = batch["attention_mask"].numpy() > 0
    read = attention(y @ p["qkv"].T, mask, 3, family == "llama")
    np.testing.assert_allclose(found[mask], (y + read @ p["o"].T)[mask], rtol=1e-9)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pals(family: str, left: bool) -> None:
    batch = FAMILIES[family].batch(left=left)
    method = "pals(width=6, heads=2, at='block[0].residual')"
    x, y, found, p = heard(family, ATTENTIONS[family][1], method, batch)
    mask = batch["attention_mask"].numpy() > 0
    read = attention(x @ p["V_E"].T @ p["qkv"].T, mask, 2, family == "llama")
    np.testing.assert_allclose(found[mask], (y + read @ p["V_D"].T)[mask], rtol=1e-9)


def test_pals_share_their_projections() -> None:
    model = FAMILIES["t5"].build()
    d, m, blocks = 32, 8, 4
    assert api.plan(model, "pals(width=8, heads=2)").trainable == 2 * d * m + blocks * 3 * m * m


def ends(mask: Any, first: int, last: int) -> tuple[list[list[int]], list[list[int]]]:
    """The places of the first and last tokens of each row's prompt, at most half of it each."""
    rows = [[t for t, real in enumerate(row) if real] for row in mask]
    halves = [len(row) // 2 for row in rows]
    return (
        [row[: min(first, half)] for row, half in zip(rows, halves, strict=True)],
        [row[len(row) - min(last, half) :] for row, half in zip(rows, halves, strict=True)],
    )


def edit(name: str, y: Any, p: dict[str, Any], end: int) -> Any:
    R, W, b = p["R"][end], p["W"][end], p["b"][end]
    if name == "direft":
        return (y @ W.T + b) @ R
    if name == "reft":
        Q, T = np.linalg.qr(R.T)
        R = (Q * np.sign(np.diag(T))).T
        np.testing.assert_allclose(R @ R.T, np.eye(len(R)), atol=1e-12)
    return (y @ W.T + b - y @ R.T) @ R


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["reft", "direft", "noreft"])
def test_edits_of_the_residual_stream(name: str, left: bool, separate: bool) -> None:
    batch = FAMILIES["llama"].batch(left=left)
    fields = f"rank=3, first=2, last=1, separate={separate}, at='block[0].residual'"
    _, y, found, p = heard("llama", "model.layers.0", f"{name}({fields})", batch)
    assert p["R"].shape == (1 + separate, 3, 32)
    expected = y.copy()
    places = ends(batch["attention_mask"].numpy(), 2, 1)
    for end, of_rows in enumerate(places):
        for row, chosen in enumerate(of_rows):
            for t in chosen:
                expected[row, t] += edit(name, y[row, t], p, end if separate else 0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    untouched = np.ones(y.shape[:2], dtype=bool)
    for of_rows in places:
        for row, chosen in enumerate(of_rows):
            untouched[row, chosen] = False
    assert np.array_equal(found[untouched], y[untouched])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
)
@settings(deadline=None, max_examples=60)
def test_the_two_ends_of_a_prompt_never_meet(lengths: list[int], first: int, last: int) -> None:
    if not first + last:
        return
    prompt = torch.arange(9).expand(len(lengths), -1) < torch.tensor(lengths).unsqueeze(1)
    y = torch.zeros(len(lengths), 9, 4)
    one = {"R": torch.eye(4)[:1].unsqueeze(0), "W": torch.zeros(1, 1, 4), "b": torch.ones(1, 1)}
    found = ReFT(rank=1, first=first, last=last).edited(y, prompt, one)[..., 0]
    expected = [min(first, n // 2) + min(last, n // 2) for n in lengths]
    assert found.sum(1).tolist() == expected and found.max() <= 1


@given(n=st.integers(0, 9), first=st.integers(0, 4), last=st.integers(0, 4), separate=st.booleans())
@settings(deadline=None, max_examples=60)
def test_short_prompts_are_edited_whole_where_that_is_asked(
    n: int, first: int, last: int, separate: bool
) -> None:
    """Where both ends meet, the edit of the last tokens holds, and each token has one."""
    if not first + last:
        return
    method = ReFT(rank=1, first=first, last=last, separate=separate, whole=True)
    prompt, y = torch.arange(9).unsqueeze(0) < n, torch.zeros(1, 9, 4)
    p = {
        "R": torch.eye(4)[:1].repeat(method.ends, 1, 1),
        "W": torch.zeros(method.ends, 1, 4),
        "b": torch.arange(1.0, 1.0 + method.ends).unsqueeze(1),
    }
    found = method.edited(y, prompt, p)[0, :, 0]
    expected = [
        0 if t >= n else method.ends if t >= n - last else 1 if t < first else 0 for t in range(9)
    ]
    assert found.tolist() == expected


def test_the_rows_of_reft_stay_orthonormal_while_it_trains() -> None:
    case = Case("reft(rank=4)", "bert")
    with case.attached(moved=False) as (model, delta):
        optimiser = torch.optim.AdamW(delta.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(4):
            optimiser.zero_grad()
            torch.autograd.backward(case.kin.logits(model, case.kin.batch()).square().sum())
            optimiser.step()
        for name, leaf in delta.tensors().items():
            if name.endswith("/R"):
                R = _orthonormal(leaf)[0]
                assert not torch.allclose(leaf[0] @ leaf[0].T, torch.eye(4), atol=1e-3)
                close(R @ R.T, torch.eye(4))


def test_pasta() -> None:
    batch = FAMILIES["bert"].batch()
    ids = batch["input_ids"]
    ids[:, 0], ids[0, 3], ids[0, 5], ids[1, 4], ids[1, 6] = 11, 12, 12, 12, 12
    ids[(ids == 11).cumsum(1) > 1] = 13  # none elsewhere
    method = "pasta(length=2, tokens='11 12', at='block[0].residual')"
    model = double("bert")
    before = Heard(model, "bert.embeddings")
    inside = Heard(model, "bert.encoder.layer.0.attention.self.query")
    delta = api.attach(model, method)
    move(delta)
    with torch.no_grad():
        model(**batch)
    e = next(iter(delta.tensors().values())).double()
    expected = before.y.clone()
    for row in range(4):
        special = [t for t in range(7) if ids[row, t] in (11, 12)]
        real = [t for t in special if batch["attention_mask"][row, t]]
        for number, t in enumerate(real[:2]):
            expected[row, t] += e[number]
    torch.testing.assert_close(inside.x, expected)
    assert not torch.equal(inside.x, before.y)


def test_hyperformer() -> None:
    batch = FAMILIES["bert"].batch()
    method = "hyperformer(bottleneck=3, embedding=4, middle=5, code=6, at='block[0].ffn')"
    _, y, found, p = heard("bert", "bert.encoder.layer.0.output.dense", method, batch)

    def norm(z: Any) -> Any:
        spread = ((z - z.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
        return (z - z.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)

    known = np.concatenate([p["task"], p["block"], p["sublayer"]])
    inside = p["W2"] @ np.maximum(p["W1"] @ known + p["b1"], 0) + p["b2"]
    final = norm(inside) * p["norm"] + p["offset"]
    made = p["W"] @ final + p["b"]
    D, U = made[: 3 * 32].reshape(3, 32), made[3 * 32 : 6 * 32].reshape(32, 3)
    c, e = np.split(made[6 * 32 :], [3])
    g, s = np.split(p["V"] @ final + p["v"], 2)
    inner = norm(np.maximum(y @ D.T + c, 0) @ U.T + e) * g + s
    np.testing.assert_allclose(found, y + inner, rtol=1e-8)


def test_hyperformer_stores_plain_bottlenecks_and_shares_what_makes_them() -> None:
    model = FAMILIES["t5"].build()
    planned = api.plan(model, "hyperformer(bottleneck=3, embedding=4, middle=5, code=6)")
    d, m, t, sites = 32, 3, 4, 8
    made = 2 * d * m + m + 3 * d
    network = made * (6 + 1) + (5 * 3 * t + 5) + (6 * 5 + 6) + 2 * 6
    assert planned.trainable == network + t * (1 + 4 + 2)  # a task, four blocks, two sublayers
    assert planned.stored == sites * made


def test_invertible() -> None:
    batch = FAMILIES["llama"].batch()
    model = double("llama")
    first = Heard(model, "model.embed_tokens")
    entering = Heard(model, "model.layers.0.input_layernorm")
    last = Heard(model, "model.norm")
    head = Heard(model, "lm_head")
    delta = api.attach(model, "invertible(bottleneck=5, activation='tanh')")
    assert delta.bank.numel == 2 * 32 * 5 + 2 * 5 + 32
    move(delta)
    with torch.no_grad():
        model(**batch)
    p = {n.rpartition("/")[2]: v.double().numpy() for n, v in delta.tensors().items()}

    def half(k: str, x: Any) -> Any:
        inner = np.tanh(x @ p[f"{k}.D"].T + p[f"{k}.c"])
        return inner @ p[f"{k}.U"].T + p[f"{k}.e"]

    a, b = np.split(first.y.numpy(), 2, axis=-1)
    y = a + half("F", b)
    there = np.concatenate([y, b + half("G", y)], axis=-1)
    np.testing.assert_allclose(entering.x.numpy(), there, rtol=1e-9)
    y, z = np.split(last.y.numpy(), 2, axis=-1)
    b = z - half("G", y)
    back = np.concatenate([y - half("F", b), b], axis=-1)
    expected = back @ model.lm_head.weight.numpy().T
    np.testing.assert_allclose(head.y.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_the_inverse_undoes_the_coupling(seed: int) -> None:
    model = FAMILIES["llama"].build()
    method = Invertible(bottleneck=4)
    residual, head = (link.site for link in api.attach(model, method).links)
    random = torch.Generator().manual_seed(seed)
    p = {
        name: torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        for name, leaf in method.init(residual).items()
    }
    y = torch.randn(3, 32, generator=random, dtype=torch.float64)
    changed = method.at_site(residual).output(y, y, p)
    assert not torch.allclose(changed, y)
    torch.testing.assert_close(method.at_site(head).output(changed, changed, p), y)


def test_invertible_leaves_a_classifier_alone_and_asks_for_a_block() -> None:
    planned = api.plan(FAMILIES["bert"].build(), "invertible(bottleneck=4)")
    assert [site.name for site in planned.sites] == ["encoder.block[0].residual"]
    with pytest.raises(TargetError, match="'residual' and 'head'; found lm_head"):
        api.plan(FAMILIES["llama"].build(), "invertible(at='head')")


# Padding


def stands(family: str, ids: Tensor, before: int, after: int) -> dict[str, Tensor]:
    """A row with padding on both sides, its positions those of the row alone."""
    length = ids.shape[1]
    wide = nn.functional.pad(ids, (before, after))
    mask = nn.functional.pad(torch.ones_like(ids), (before, after))
    batch = {"input_ids": wide, "attention_mask": mask}
    if family in ("t5", "deberta_v2"):
        return batch
    positions = (torch.arange(before + length + after) - before).clamp(0, length - 1)
    return {**batch, "position_ids": positions.expand(len(ids), -1)}


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("method", READERS, ids=lambda text: text.partition("(")[0])
def test_padding_on_either_side_changes_nothing(method: str, family: str) -> None:
    kin, model = FAMILIES[family], FAMILIES[family].build().requires_grad_(False)
    move(api.attach(model, method))
    ids = kin.batch()["input_ids"][:1]
    stack: Any = model.get_encoder() if family == "t5" else model.base_model
    base = stack(**stands(family, ids, 0, 0))[0].detach()
    for before, after in ((0, 3), (3, 0), (2, 1)):
        found = stack(**stands(family, ids, before, after))[0].detach()
        close(found[:, before : before + ids.shape[1]], base)


# Prompts


def answered() -> tuple[Any, dict[str, Tensor], Delta]:
    model = FAMILIES["llama"].build().requires_grad_(False)
    delta = api.attach(model, "reft(rank=2, first=1, last=1)")
    move(delta)
    batch = FAMILIES["llama"].batch(left=True)
    return model, batch, delta


def test_labels_say_where_a_prompt_ends() -> None:
    model, batch, _ = answered()
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    whole = model(**batch, labels=labels).logits.detach()
    prompt = {name: value[:, :4] for name, value in batch.items()}
    close(whole[:, :4], model(**prompt).logits.detach())
    assert not torch.allclose(whole, model(**batch).logits.detach())


def test_labels_may_be_told_beside_the_call() -> None:
    model, batch, delta = answered()
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    expected = model(**batch, labels=labels).logits
    with delta.host.labels.set(labels):
        assert torch.equal(model(**batch).logits, expected)
    assert delta.host.answers is None


def test_what_comes_after_the_first_call_is_not_edited() -> None:
    model, batch, _ = answered()
    layer = Heard(model, "model.layers.0")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**batch, past_key_values=cache)
        step = {
            "input_ids": batch["input_ids"][:, :4],
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 4), value=1),
        }
        kept = copy.deepcopy(cache)
        model(**step, past_key_values=cache)
        edited = layer.y.clone()
        host = host_of(model)
        assert host is not None
        with host.deltas[0].active(False):
            model(**step, past_key_values=kept)
    # The first block reads the same keys and values, which come before any edit.
    assert torch.equal(edited, layer.y)


def test_an_encoder_decoder_has_its_prompt_in_the_encoder() -> None:
    planned = api.plan(FAMILIES["t5"].build(), "reft")
    assert [site.name for site in planned.sites] == [
        "encoder.block[0].residual",
        "encoder.block[1].residual",
    ]


# Caches


@pytest.mark.parametrize("method", ["tiny_attention(heads=2)", f"pasta(tokens='{SPECIAL}')"])
def test_what_was_shown_is_cut_with_the_cache(method: str) -> None:
    case = Case(method, "llama")
    ids = case.kin.batch()["input_ids"][:2]
    with case.attached() as (model, _), torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        cache = DynamicCache()  # whose layers grow as they are asked for
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-2)
        found = model(input_ids=ids[:, -2:], past_key_values=cache).logits[:, -1]
        close(found, expected)
        cache.reset()  # type: ignore[no-untyped-call]
        close(model(input_ids=ids, past_key_values=cache).logits[:, -1], expected)


def test_a_cache_that_was_filled_without_it_is_refused() -> None:
    case = Case("tiny_attention(heads=2)", "llama")
    ids = case.kin.batch()["input_ids"]
    model = case.model()
    cache = model(input_ids=ids).past_key_values
    api.attach(model, case.expression)
    with pytest.raises(StateError, match="holds 7 tokens, and 0 of them were read"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_rows_of_several_slots_generate_as_alone() -> None:
    case = Case("tiny_attention(heads=2)", "gpt2")
    batch = case.kin.batch(left=True)
    with case.attached(slots=2) as (model, delta):
        with delta.route([1, None, 0, 1]):
            mixed = case.generate(model, **batch)
        for row, slot in enumerate([1, None, 0, 1]):
            with delta.route([slot] * 4):
                assert torch.equal(case.generate(model, **batch)[row], mixed[row])


# Gradients and threads


def test_two_checkpointed_passes_before_one_backward_pass_keep_their_texts() -> None:
    case = Case("tiny_attention(heads=2) + reft(rank=2)", "bert")
    batches = [case.kin.batch(seed=seed) for seed in (0, 1)]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].roll(1, dims=0)
    gradients: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        with case.attached() as (model, delta):
            if checkpointed:
                model.activation_checkpointing_enable()
                model.train()
            loss = sum(case.kin.logits(model, batch).square().sum() for batch in batches)
            assert isinstance(loss, Tensor)
            torch.autograd.backward(loss)
            gradients.append(named_gradients(delta, 0))
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_threads_keep_their_texts() -> None:
    case = Case("tiny_attention(heads=2)", "bert")
    batches = [case.kin.batch(rows=1 + k, seed=k) for k in range(4)]
    with case.attached() as (model, _):
        expected = [case.kin.logits(model, batch).detach() for batch in batches]
        found: dict[int, list[Tensor]] = {k: [] for k in range(4)}

        def work(k: int) -> None:
            for _ in range(5):
                found[k].append(case.kin.logits(model, batches[k]).detach())

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for k, results in found.items():
        assert len(results) == 5 and all(torch.equal(one, expected[k]) for one in results)


# Refusals


def test_no_mask_means_that_all_tokens_are_real() -> None:
    case = Case("tiny_attention(heads=2)", "bert")
    batch = case.kin.batch()
    with case.attached() as (model, _):
        ones = torch.ones_like(batch["attention_mask"])
        expected = model(input_ids=batch["input_ids"], attention_mask=ones).logits
        close(model(input_ids=batch["input_ids"]).logits, expected)
        masked = model(**batch).logits
        assert not torch.allclose(masked, expected)


def test_a_mask_of_pairs_is_refused() -> None:
    case = Case("reft(rank=2)", "llama")
    ids = case.kin.batch()["input_ids"]
    with case.attached() as (model, _):
        pairs = torch.ones(4, 1, 7, 7, dtype=torch.bool).tril()
        with pytest.raises(UnsupportedError, match=r"needs a mask \[rows, 7\].*\(4, 1, 7, 7\)"):
            model(input_ids=ids, attention_mask=pairs)


def test_virtual_tokens_in_front_of_a_text_that_is_read_are_refused_at_once() -> None:
    model = FAMILIES["llama"].build().requires_grad_(False)
    before = marks(model)
    for first, second in (("tiny_attention", "prompt(length=2)"), ("prompt(length=2)", "reft")):
        with pytest.raises(UnsupportedError, match="reads the text of the decoder, in front"):
            api.attach(model, f"{first} + {second}")
        assert marks(model) == before
        kept = api.attach(model, first)
        with pytest.raises(UnsupportedError, match="in front of which prompt puts"):
            api.attach(model, second)
        kept.detach()
    assert marks(model) == before


def test_other_tokens_than_those_of_the_text_are_refused() -> None:
    model = FAMILIES["bert"].build()
    api.attach(model, "tiny_attention(at='pooler')")
    with pytest.raises(UnsupportedError, match="what a pooler or an expert"):
        model(**FAMILIES["bert"].batch())


def test_embeddings_name_no_special_tokens() -> None:
    case = Case("pasta", "llama")
    with case.attached() as (model, _):
        embeds = model.get_input_embeddings()(case.kin.batch()["input_ids"])
        with pytest.raises(UnsupportedError, match="called with inputs_embeds"):
            model(inputs_embeds=embeds)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("target", ["cross_attention.k", "cross_attention.v", "head", "shared"])
def test_what_reads_the_text_of_no_stack_or_another_is_refused(target: str) -> None:
    with pytest.raises(UnsupportedError, match="works on the text of no module"):
        api.attach(FAMILIES["t5"].build(), f"tiny_attention(at='{target}')")


def test_a_model_without_a_token_stack_is_refused_and_left_alone() -> None:
    model = Plain()
    with pytest.raises(UnsupportedError, match="works on the text of no module"):
        api.attach(model, "tiny_attention(at='layers.0')")
    assert host_of(model) is None and "forward" not in model.layers[0].__dict__


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("tiny_attention(heads=0)", ConfigurationError),
        ("pals(width=10, heads=3)", ConfigurationError),
        ("reft(rank=0)", ConfigurationError),
        ("reft(first=0, last=0)", ConfigurationError),
        ("reft(first=-1)", ConfigurationError),
        ("direft(rank=33)", TargetError),
        ("pasta(tokens='cls')", ConfigurationError),
        ("pasta(length=0)", ConfigurationError),
        ("hyperformer(embedding=0)", ConfigurationError),
        ("hyperformer(bias=False)", ConfigurationError),
    ],
)
def test_what_cannot_be_meant_is_refused(method: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        api.plan(FAMILIES["bert"].build(), method)


@given(past=st.integers(0, 3), tokens=st.integers(1, 4), causal=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_what_a_token_sees(past: int, tokens: int, causal: bool, data: st.DataObject) -> None:
    every = past + tokens
    real = data.draw(st.lists(st.booleans(), min_size=every, max_size=every))
    text = Text(torch.tensor([real]), torch.ones(1, tokens, dtype=torch.bool), None, causal)
    for t in range(tokens):
        for s in range(every):
            expected = s == past + t or (real[s] and (not causal or s < past + t))
            assert bool(text.sees[0, t, s]) == expected
    assert torch.equal(text.of_rows(torch.tensor([0])).sees, text.sees)


def test_a_residual_target_names_blocks() -> None:
    model = FAMILIES["gpt2"].build()
    planned = api.plan(model, "adapter(bottleneck=4, at='block[1].residual')")
    assert [site.path for site in planned.sites] == ["transformer.h.1"]
    with pytest.raises(TargetError, match="needs a linear weight"):
        api.plan(model, "lora(at='residual')")
