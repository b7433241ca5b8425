"""Methods that lengthen a sequence against PEFT 0.21, and against what their papers say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltatune import api
from deltatune.backbones.virtual_tokens import start_from_text
from deltatune.core.artefact import read, stored_tensors
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ArtefactError,
    ConfigurationError,
    StateError,
    UnsupportedError,
)
from deltatune.core.swap import swap
from deltatune.testing.case import move, named_gradients
from deltatune.testing.families import FAMILIES

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
# PEFT 0.21 asks transformers by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def attached(method: str, family: str = "llama") -> tuple[PreTrainedModel, Delta]:
    """A miniature with a delta, in evaluation mode."""
    model = FAMILIES[family].build()
    return model, api.attach(model, method)


def leaves(delta: Delta, slot: int = 0) -> dict[str, Tensor]:
    """The leaves of a delta at its only site, by their own names."""
    return {name.rpartition("/")[2]: value for name, value in delta.tensors(slot).items()}


def logits(model: Any, family: str = "llama") -> Tensor:
    with torch.no_grad():
        return FAMILIES[family].logits(model, FAMILIES[family].batch())


def peft_encoder(kind: str, p: dict[str, Tensor]) -> Any:
    """PEFT's encoder with our leaves."""
    config = peft.PromptEncoderConfig(
        peft_type="P_TUNING",
        num_virtual_tokens=len(p["E"]),
        token_dim=p["E"].shape[1],
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=5,
    )
    encoder = peft.PromptEncoder(config)
    maps = [layer for layer in encoder.mlp_head if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        encoder.embedding.weight.copy_(p["E"])
        for k, layer in enumerate(maps, 1):
            layer.weight.copy_(p[f"W{k}"])
            layer.bias.copy_(p[f"b{k}"])
        names = {"W": "weight_ih", "U": "weight_hh", "b": "bias_ih", "c": "bias_hh"}
        for name in [name for name in p if "." in name]:
            own, layer = name.split(".")
            for direction, end in enumerate(("", "_reverse")):
                theirs = getattr(encoder.lstm_head, f"{names[own]}_l{layer}{end}")
                theirs.copy_(p[name][direction])
    return encoder


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_makes_the_tokens_of_peft(kind: str) -> None:
    _, delta = attached(f"p_tuning(length=4, encoder={kind.lower()!r}, middle=5)")
    encoder = peft_encoder(kind, leaves(delta)).double()
    held = {name: value.double().requires_grad_() for name, value in leaves(delta).items()}
    mine, theirs = delta.parts[0].method.embed(held), encoder(torch.arange(4))
    torch.testing.assert_close(mine, theirs, **EXACT)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    assert sum(p.numel() for p in encoder.parameters()) == delta.bank.numel
    torch.testing.assert_close(held["E"].grad, encoder.embedding.weight.grad, **EXACT)


MADE = {
    "p_tuning(length=4, middle=5)": 4,
    "p_tuning(length=4, encoder='lstm', middle=5)": 4,
    "intrinsic_prompt(length=3, dimension=2, middle=5)": 3,
    "mpt(length=5)": 5,
    "mpt(length=2, frozen=True)": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "length"), MADE.items())
def test_what_makes_tokens_is_kept_as_a_prompt(
    method: str, length: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = FAMILIES["llama"].build().to(dtype)
    delta = api.attach(model, method)
    move(delta)
    expected = logits(model)
    folder = api.save(delta, tmp_path / "delta")
    assert read(folder).method == f"prompt(length={length})"
    assert list(stored_tensors(delta)) == ["prompt/decoder/P"]
    with pytest.raises(ArtefactError, match="Load it as a delta of its own"):
        swap(delta, folder)
    delta.detach()
    api.load(folder, model)
    assert torch.equal(logits(model), expected)


def test_p_tuning_beside_a_prompt_keeps_both(tmp_path: Path) -> None:
    model, delta = attached("p_tuning(length=2, middle=5) + prompt(length=3)")
    move(delta)
    expected = logits(model)
    folder = api.save(delta, tmp_path / "delta")
    assert set(read(folder).tensors) == {"prompt/decoder/P", "prompt.2/decoder/P"}
    delta.detach()
    api.load(folder, model)
    assert torch.equal(logits(model), expected)


def test_an_intrinsic_prompt_is_decoded_from_its_vector() -> None:
    _, delta = attached("intrinsic_prompt(length=3, dimension=2, middle=5)")
    p = {name: value.double().numpy() for name, value in leaves(delta).items()}
    tokens = p["W2"] @ np.tanh(p["W1"] @ p["z"] + p["b1"]) + p["b2"]
    made = delta.parts[0].method.embed(leaves(delta))
    np.testing.assert_allclose(made.numpy(), tokens.reshape(3, -1), rtol=1e-5, atol=1e-6)
    assert delta.bank.trained == {"intrinsic_prompt/decoder/z": (2,)}


@torch.no_grad()
def test_an_intrinsic_prompt_reaches_every_prompt_with_maps_that_are_identities() -> None:
    """tanh is the identity to rounding near zero; the second map undoes the scale."""
    small = 1e-4
    _, delta = attached("intrinsic_prompt(length=2, dimension=64, middle=64)")
    p = {name: torch.zeros_like(value) for name, value in leaves(delta).items()}
    p["W1"], p["W2"] = small * torch.eye(64), torch.eye(64) / small
    p["z"] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    made = delta.parts[0].method.embed(p)
    torch.testing.assert_close(made.flatten(), p["z"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_mpt_starts_as_its_prompt(frozen: bool) -> None:
    model, delta = attached(f"mpt(length=3, frozen={frozen})")
    p = leaves(delta)
    started = logits(model)
    delta.detach()
    prompt = api.attach(model, "prompt(length=3)")
    prompt.bank.write(0, {"prompt/decoder/P": p["P"]})
    assert torch.equal(logits(model), started)
    assert delta.bank.numel == (0 if frozen else p["P"].numel()) + 3 + p["P"].shape[1]


def test_mpt_is_a_prompt_times_an_outer_product() -> None:
    _, delta = attached("mpt(length=3)")
    move(delta)
    p = {name: value.double().numpy() for name, value in leaves(delta).items()}
    made = delta.parts[0].method.embed(leaves(delta))
    tokens = p["P"] * np.outer(p["u"], p["v"])
    np.testing.assert_allclose(made.numpy(), tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("p_tuning(length=0)", "length must be at least 1"),
        ("mpt(length=0)", "length must be at least 1"),
        ("p_tuning(middle=0)", "encoder mlp or lstm"),
        ("p_tuning(encoder='gru')", "encoder mlp or lstm"),
        ("intrinsic_prompt(dimension=0)", "dimension and middle"),
    ],
)
def test_what_makes_no_tokens_is_refused(method: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        attached(method)


def adaption_prompt(family: str, delta: Delta) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model with our leaves, and its parameters by our names."""
    model = FAMILIES[family].build().double()
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    wrapped = peft.get_peft_model(model, config)
    found: dict[str, Tensor] = {}
    for name, value in delta.tensors().items():
        _, site, leaf = name.split("/")
        attention = model.model.layers[int(site.split("[")[1][0])].self_attn
        parameter = attention.adaption_prompt if leaf == "P" else attention.adaption_gate
        with torch.no_grad():
            value = value if leaf == "P" else torch.tanh(value.double())
            parameter.data = value.double().reshape(parameter.shape).clone()
        found[name] = parameter
    return wrapped, found


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llama_adapter_equals_peft(family: str) -> None:
    """PEFT has no tanh about its gate."""
    kin = FAMILIES[family]
    model = kin.build().double()
    delta = api.attach(model, "llama_adapter(length=3)")
    move(delta)
    wrapped, theirs = adaption_prompt(family, delta)
    found, expected = kin.logits(model, kin.batch()), kin.logits(wrapped, kin.batch())
    assert not torch.allclose(found, kin.logits(kin.build().double(), kin.batch()), atol=1e-4)
    torch.testing.assert_close(found, expected, **EXACT)
    found.square().mean().backward()
    expected.square().mean().backward()
    for name, gradient in named_gradients(delta, 0).items():
        wanted = theirs[name].grad
        assert wanted is not None and wanted.abs().max() > 0
        if name.endswith("/g"):
            wanted = wanted * (1 - torch.tanh(delta.tensors()[name].double()).square().flatten())
        scale = float(wanted.abs().max())
        flat = wanted.reshape(gradient.shape).float()
        torch.testing.assert_close(gradient, flat, rtol=1e-5, atol=1e-5 * scale)


def test_a_gate_moves_before_its_prompt() -> None:
    model, delta = attached("llama_adapter(length=3)")
    base = logits(FAMILIES["llama"].build())
    assert torch.equal(logits(model), base)
    FAMILIES["llama"].logits(model, FAMILIES["llama"].batch()).square().mean().backward()
    for name, gradient in named_gradients(delta, 0).items():
        assert bool(gradient.any()) == name.endswith("/g")


def test_a_gated_prompt_has_a_softmax_of_its_own() -> None:
    """o + tanh(g) softmax(q Kᵀ) V in float64, of what GPT-2's first attention gives to W_o."""
    model = FAMILIES["gpt2"].build().double()
    attention = model.transformer.h[0].attn
    heads, width = attention.num_heads, attention.head_dim
    seen: dict[str, Tensor] = {}

    def keep_first(_: Any, args: Any, out: Tensor) -> None:
        seen.setdefault("qkv", out.detach())

    attention.c_attn.register_forward_hook(keep_first)
    attention.c_proj.register_forward_pre_hook(lambda _, args: seen.update(o=args[0].detach()))
    batch = FAMILIES["gpt2"].batch()
    model(**batch)
    plain = seen["o"].numpy()
    q = seen["qkv"].split(heads * width, dim=-1)[0].numpy()
    delta = api.attach(model, "llama_adapter(length=3)", at="block[0].self_attention")
    move(delta)
    model(**batch)
    p = {name: value.double() for name, value in leaves(delta).items()}
    _, k, v = np.split(attention.c_attn(p["P"]).detach().numpy(), 3, axis=-1)
    split = [part.reshape(*part.shape[:-1], heads, width) for part in (q, k, v)]
    scores = np.einsum("rthd,shd->rhts", split[0], split[1]) / np.sqrt(width)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    given = np.einsum("rhts,shd->rthd", weights, split[2]).reshape(plain.shape)
    wanted = plain + np.tanh(float(p["g"])) * given
    np.testing.assert_allclose(seen["o"].numpy(), wanted, rtol=1e-6, atol=1e-8)


def test_llama_adapter_wants_projections_of_the_model_s_width() -> None:
    with pytest.raises(UnsupportedError, match="makes keys and values of a latent vector"):
        attached("llama_adapter", "deepseek_v3")


TEXT = torch.tensor([5, 9, 2, 44])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3", "gpt2"])
def test_a_prefix_starts_as_the_text_before_a_text(family: str) -> None:
    """Rotary positions see to it; with learned ones the caller counts on from the prefix."""
    model = FAMILIES[family].build()
    ids = FAMILIES[family].batch()["input_ids"][:1]
    together = model(torch.cat([TEXT[None], ids], dim=1)).logits[:, len(TEXT) :]
    delta = api.attach(model, f"prefix(length={len(TEXT)})", slots=2)
    other = delta.tensors(0)
    start_from_text(delta, TEXT, slot=1)
    places = torch.arange(ids.shape[1])[None] + (len(TEXT) if family == "gpt2" else 0)
    with delta.route([1]):
        found = model(ids, position_ids=places).logits
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, other[name]) for name, value in delta.tensors(0).items())


@torch.no_grad()
def test_a_prefix_of_an_encoder_starts_as_a_text() -> None:
    model, delta = attached("prefix(length=4, at='encoder.self_attention')", "t5")
    embedded = model.encoder.block[0].layer[0].layer_norm(model.shared(TEXT))
    start_from_text(delta, TEXT[None])
    wanted = model.encoder.block[0].layer[0].SelfAttention.k(embedded)
    torch.testing.assert_close(leaves_at(delta, "encoder.block[0]")["K"], wanted)


def leaves_at(delta: Delta, site: str) -> dict[str, Tensor]:
    """The leaves of a delta at the site whose name begins so, by their own names."""
    own = {name.split("/", 1)[1]: value for name, value in delta.tensors().items()}
    return {name.rpartition("/")[2]: v for name, v in own.items() if name.startswith(site)}


@pytest.mark.parametrize(
    ("method", "family", "match"),
    [
        ("prefix(length=3)", "llama", "of 4 tokens reaches .* of 3, with 4 tokens"),
        ("prefix(length=4)", "t5", "not at all.* give it at='encoder.self_attention'"),
        ("prefix(length=4, reparameterise=True)", "llama", "has no plain keys and values"),
        ("llama_adapter(length=4)", "llama", "has no plain keys and values"),
        ("lora(rank=2)", "llama", "has no plain keys and values"),
    ],
)
def test_what_cannot_start_as_a_text_says_so(method: str, family: str, match: str) -> None:
    _, delta = attached(method, family)
    before = delta.tensors()
    with pytest.raises(ConfigurationError, match=match):
        start_from_text(delta, TEXT)
    assert all(torch.equal(value, before[name]) for name, value in delta.tensors().items())


def test_a_text_is_read_in_evaluation_mode() -> None:
    model, delta = attached("prefix(length=4)")
    model.train()
    with pytest.raises(StateError, match=r"call model.eval\(\)"):
        start_from_text(delta, TEXT)
