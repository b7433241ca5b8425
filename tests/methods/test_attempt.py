"""ATTEMPT: its formula in float64 numpy, what it reads of a text, its sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError
from deltatune.core.start import fill_expert
from deltatune.core.text import Text
from deltatune.methods import Attempt
from deltatune.testing.case import Case, close, move
from deltatune.testing.compiled_laws import law_compiled
from deltatune.testing.families import FAMILIES

ATTEMPT = "attempt(length=3, sources=2, middle=5, temperature=0.05)"


def leaves(delta: Delta) -> dict[str, Tensor]:
    return {name.rpartition("/")[2]: value for name, value in delta.tensors().items()}


def tokens(x: Any, prompt: Any, p: dict[str, Any], temperature: float) -> Any:
    """The virtual tokens of one row."""
    most = x[prompt].max(0)
    hidden = p["W1"] @ most
    inner = p["W2"] @ (hidden / (1 + np.exp(-hidden)))
    inner = (inner - inner.mean()) / np.sqrt(inner.var() + 1e-5)
    query = inner * p["gain"] + p["shift"]
    prompts = [*p["P"], p["T"]]
    scores = np.array([one.max(0) @ query for one in prompts]) / (temperature * len(query))
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return p["T"] + sum(w * one for w, one in zip(weights, prompts, strict=True))


def of_row(p: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.double().numpy() for name, value in p.items()}


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_every_row_has_the_prompt_of_its_text(family: str) -> None:
    """A row's logits are those behind an ordinary prompt that holds the tokens of the formula."""
    kin = FAMILIES[family]
    model, batch = kin.build().double().requires_grad_(False), kin.batch()
    delta = api.attach(model, ATTEMPT)
    move(delta)
    found, p = kin.logits(model, batch).detach(), leaves(delta)
    table: Any = model.get_input_embeddings()
    embedded = table(batch["input_ids"]).numpy()
    delta.detach()
    plain = api.attach(model, "prompt(length=3)")
    (name,) = plain.tensors()
    made = [
        tokens(embedded[row], batch["attention_mask"][row].bool().numpy(), of_row(p), 0.05)
        for row in range(4)
    ]
    assert not np.allclose(made[0], made[1], atol=1e-3)
    for row in range(4):
        plain.bank.write(0, {name: torch.from_numpy(made[row])})
        torch.testing.assert_close(
            found[row], kin.logits(model, batch).detach()[row], rtol=1e-5, atol=1e-5
        )


@given(seed=st.integers(0, 1000), rows=st.integers(1, 3), length=st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_the_weights_lie_on_a_simplex(seed: int, rows: int, length: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    p = {"W1": drawn(4, 8), "W2": drawn(8, 4), "gain": drawn(8), "shift": drawn(8)}
    real = torch.rand(rows, length, generator=random) < 0.5
    x, text = drawn(rows, length, 8), Text(real, real, None, False)
    alike = drawn(2, 8)
    p |= {"P": alike.expand(3, -1, -1), "T": alike}
    method = Attempt(sources=3, length=2, middle=4, temperature=0.1)
    torch.testing.assert_close(method.embed_for(x, text, p), (2 * alike).expand(rows, -1, -1))
    # So that one source whose weight is one is added as it is.
    apart = p | {"P": torch.stack([alike + 1, alike, alike]), "W2": drawn(8, 4).zero_()}
    apart |= {"shift": torch.full((8,), 1e4, dtype=torch.float64)}
    torch.testing.assert_close(
        method.embed_for(x, text, apart), (2 * alike + 1).expand(rows, -1, -1)
    )


def test_answers_are_not_read() -> None:
    case = Case(ATTEMPT, "llama")
    with case.attached() as (model, _):
        batch = case.kin.batch(left=True)
        labels = batch["input_ids"].clone()
        labels[:, :4] = -100
        whole = model(**batch, labels=labels).logits.detach()
        prompt = {name: value[:, :4] for name, value in batch.items()}
        close(whole[:, :4], model(**prompt).logits.detach())
        assert not torch.allclose(whole[:, :4], model(**batch).logits.detach()[:, :4], atol=1e-4)


@torch.no_grad()
def test_rows_without_it_are_left_alone_where_nothing_is_padded() -> None:
    kin = FAMILIES["t5"]
    batch = {name: value for name, value in kin.batch().items() if name != "attention_mask"}
    base = kin.logits(kin.build(), batch)
    with Case(ATTEMPT, "t5").attached(slots=2) as (model, delta):
        with delta.route([1, None, 0, None]):
            mixed = kin.logits(model, batch)
        with delta.route([1] * 4):
            close(mixed[0], kin.logits(model, batch)[0])
    close(mixed[1], base[1])
    close(mixed[3], base[3])
    assert not torch.allclose(mixed[2], base[2], atol=1e-3)


@torch.no_grad()
def test_beside_a_prompt() -> None:
    kin = FAMILIES["bert"]
    with Case(f"{ATTEMPT} + prompt(length=2)", "bert").attached() as (model, delta):
        together = kin.logits(model, kin.batch())
        held = delta.tensors()
    model = kin.build()
    for name in (ATTEMPT, "prompt(length=2)"):
        one = api.attach(model, name)
        one.bank.write(0, {leaf: held[leaf] for leaf in one.tensors()})
    assert torch.equal(kin.logits(model, kin.batch()), together)


def test_its_sources_are_filled_from_trained_prompts_and_stay(tmp_path: Path) -> None:
    kin = FAMILIES["t5"]
    sources = []
    for seed in (1, 2):
        source = api.attach(kin.build(), "prompt(length=3, start='uniform')")
        move(source, seed)
        sources.append(source)
    model = kin.build()
    delta = api.attach(model, ATTEMPT)
    fill_expert(delta, sources[0], 0)
    fill_expert(delta, api.save(sources[1], tmp_path / "source"), 1)
    for number, source in enumerate(sources):
        assert torch.equal(leaves(delta)["P"][number], leaves(source)["P"])
    kept = leaves(delta)["P"].clone()
    torch.autograd.backward(kin.logits(model, kin.batch()).square().sum())
    torch.optim.AdamW(delta.parameters(), lr=0.1).step()
    assert torch.equal(leaves(delta)["P"], kept)
    assert delta.bank.numel == 3 * 32 + 2 * 32 * 5 + 2 * 32
    expected = kin.logits(model, kin.batch())
    folder = api.save(delta, tmp_path / "delta")
    delta.detach()
    api.load(folder, model)
    assert torch.equal(kin.logits(model, kin.batch()), expected)


def test_a_prompt_of_another_length_is_no_source() -> None:
    kin = FAMILIES["t5"]
    delta = api.attach(kin.build(), ATTEMPT)
    with pytest.raises(ConfigurationError, match="must be one method"):
        fill_expert(delta, api.attach(kin.build(), "prompt(length=4)"), 0)


@pytest.mark.parametrize("fields", ["length=0", "sources=0", "middle=0", "temperature=0.0"])
def test_what_cannot_be_meant_is_refused(fields: str) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        api.plan(FAMILIES["bert"].build(), f"attempt({fields})")


def test_one_graph_compiled_before_the_delta_came(tmp_path: Path) -> None:
    law_compiled(Case(ATTEMPT, "bert"), tmp_path)
