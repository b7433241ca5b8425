"""A quantised base is the dense one with the rounded weights, for every face; and refusals."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from deltatune import api
from deltatune.backbones import quantise
from deltatune.backbones.int8 import Int8Linear
from deltatune.backbones.load import load_architecture, load_backbone
from deltatune.core.artefact import backbone_of
from deltatune.core.errors import (
    BackboneMismatchError,
    ConfigurationError,
    StateError,
    TargetError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.fingerprint import fingerprint
from deltatune.core.quantised import Quantised, base_bytes, count_parameters, format_of
from deltatune.core.storage import storage_of
from deltatune.core.target import find_sites
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

FORMATS = ("int8", "nf4", "llm_int8", "torchao_int8")
SIZES = st.integers(2, 9)  # bitsandbytes takes two codes for a row of a transposed matrix
ROUGH = {"rtol": 0.05, "atol": 0.05}


def keep_as(model: nn.Module, format: str) -> None:
    """Quantises a model as `quantise` does, or as the user of another library would."""
    if format in ("nf4", "llm_int8"):
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    if format in ("int8", "nf4"):
        quantise(model, format)
        return
    paths = {site.path for site in find_sites(model, "block.linear", "weight")}
    if format == "torchao_int8":
        library = pytest.importorskip("torchao.quantization", reason="needs torchao")
        library.quantize_(
            model, library.Int8WeightOnlyConfig(), filter_fn=lambda _, path: path in paths
        )
        return
    for path in paths:
        model.set_submodule(path, llm_int8(model.get_submodule(path)))


def llm_int8(linear: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    assert isinstance(linear, nn.Linear)
    made = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.weight = Int8Params(linear.weight.data, requires_grad=False)
    made.bias = linear.bias
    # In training mode, on a CPU, it rounds weights alone.
    found: nn.Module = made.to("cpu").train()
    return found


def build(format: str | None, family: str = "bert") -> nn.Module:
    model = FAMILIES[family].build().requires_grad_(False)
    if format is not None:
        keep_as(model, format)
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    """The same model with the rounded weights in plain numbers."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        storage = storage_of(module)
        if isinstance(storage, Quantised):
            weight = storage.dequantise(module, torch.float32)
            bias = module._parameters.get("bias")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.weight.data = weight
            linear.bias = bias
            twin.set_submodule(path, linear.requires_grad_(False))
    return twin


def agree(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        scale = max(float(other.detach().abs().max()), 1.0)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("method", [None, "lora(rank=2, at='0')", "bitfit(at='0')"])
@pytest.mark.parametrize("format", ["int8", "nf4"])
@settings(deadline=None, max_examples=20)
@given(inputs=SIZES, outputs=SIZES, rows=SIZES, tokens=SIZES, bias=st.booleans())
def test_a_map_is_the_product_with_its_plain_numbers(
    format: str, method: str | None, inputs: int, outputs: int, rows: int, tokens: int, bias: bool
) -> None:
    if format == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    torch.manual_seed(inputs)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).requires_grad_(False)
    quantise(model, format, at="0")
    results = []
    for one in (model, plain_twin(model)):
        leaves = [torch.randn(rows, tokens, inputs, requires_grad=True)]
        leaves[0].data = torch.linspace(-1, 1, leaves[0].numel()).view_as(leaves[0])
        if method is not None:
            delta = api.attach(one, method)
            move(delta)
            leaves += delta.bank.slots
        y = one(leaves[0])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    agree(*results)


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=3)",
        "lora(rank=2, dropout=0.3)",
        "adapter(bottleneck=4)",
        "parallel(bottleneck=4)",
        "prefix(length=2)",
        "prompt(length=2)",
        "bitfit",
        "bitfit(at='norm')",
        "last_layer",
        "selective_module(budget=0.3)",
        "last_layer + lora(rank=2) + bitfit",
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_every_face_sees_the_plain_numbers(format: str, method: str) -> None:
    kin, model = FAMILIES["bert"], build(format)
    results = []
    for one in (model.train(), plain_twin(model)):
        bank = api.attach(one, method, slots=2)
        move(bank)
        for rows in ([0, 0, 0, 0], [0, 1, 0, 1], [0, None, 1, 1]):
            with bank.route(rows):
                logits = kin.logits(one, kin.batch())
                logits.square().sum().backward()
            gradients = [row.grad for row in bank.bank.slots if row.grad is not None]
            results.append((logits, *gradients))
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        agree(mine, theirs)


@pytest.mark.parametrize("family", ["t5_gated", "gpt2", "llama", "mixtral"])
def test_families_generate_and_train_on_int8(family: str) -> None:
    kin, model = FAMILIES[family], build("int8", family)
    results = []
    for one in (model, plain_twin(model)):
        delta = api.attach(one, "lora(rank=2) + prefix(length=2)")
        move(delta)
        logits = kin.logits(one, kin.batch())
        logits.square().mean().backward()
        assert delta.bank.slots[0].grad is not None
        results.append((logits, delta.bank.slots[0].grad))
    agree(*results)


@pytest.mark.parametrize("format", ["int8", "nf4", "llm_int8"])  # torchao's own forward keeps it
@pytest.mark.parametrize("method", [None, "lora(rank=2)", "bitfit"])
def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass(
    format: str, method: str | None
) -> None:
    kin, model = FAMILIES["bert"], build(format).train()
    if method is not None:
        api.attach(model, method)
    model.get_input_embeddings().register_forward_hook(lambda *called: called[2].requires_grad_())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held):
        kin.logits(model, kin.batch()).sum().backward()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    made = {tuple(t.shape) for t in kept if t.is_floating_point() and t.data_ptr() not in own}
    assert made and not made & {(32, 32), (32, 48), (48, 32)}


def test_int8_rounds_to_the_nearest_of_255_steps() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    made = Int8Linear(weight)
    step = made.scale[:, None]
    assert (made.dequantise(torch.float32) - weight).abs().le(step / 2 + 1e-7).all()
    assert made.weight.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127, 127]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_computes_in_the_dtype_of_its_input_or_of_autocast(dtype: torch.dtype) -> None:
    made = Int8Linear(torch.randn(5, 4), nn.Parameter(torch.randn(5), requires_grad=False))
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y, wanted = made(x), functional.linear(x, made.dequantise(torch.float32), made.bias)
    assert y.dtype == wanted.dtype == dtype
    torch.testing.assert_close(y, wanted, **ROUGH)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(gradient, made.dequantise(x.dtype).sum(0).expand(3, 4), **ROUGH)
    assert made.to(dtype)(x.to(dtype)).dtype == dtype


def test_int8_under_transforms_and_as_one_graph() -> None:
    made = Int8Linear(torch.randn(5, 4), nn.Parameter(torch.randn(5)))
    x = torch.randn(3, 4)
    wanted = made.dequantise(torch.float32).sum(0).expand(3, 4)
    torch.testing.assert_close(torch.func.grad(lambda x: made(x).sum())(x), wanted)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), made(x))
    made(x).sum().backward()
    assert made.bias is not None and made.bias.grad is not None  # unfrozen by hand


@pytest.mark.parametrize("format", FORMATS)
def test_counts_are_those_of_the_matrices_and_bytes_those_of_the_codes(format: str) -> None:
    plain, model = build(None), build(format)
    assert format_of(plain) is None and format_of(model) == format
    assert count_parameters(model) == count_parameters(plain)
    matrices = sum(
        math.prod(storage_of(m).widths(m))
        for m in model.modules()
        if isinstance(storage_of(m), Quantised)
    )
    saved = base_bytes(plain) - base_bytes(model)
    assert (3.4 if format == "nf4" else 2.7) * matrices < saved < 4 * matrices
    for method in ("lora", "last_layer", "selective_module(budget=0.2)", "bitfit"):
        mine, theirs = api.plan(model, method), api.plan(plain, method)
        assert (mine.trainable, mine.base, mine.sites) == (
            theirs.trainable,
            theirs.base,
            mine.sites,
        )
        assert mine.memory.base == base_bytes(model)


@pytest.mark.parametrize("format", FORMATS)
def test_a_delta_knows_the_format_it_was_trained_on(format: str, tmp_path: Path) -> None:
    kin, model = FAMILIES["bert"], build(format)
    delta = api.attach(model, "lora(rank=2)")
    move(delta)
    before = kin.logits(model, kin.batch())
    folder = api.save(delta, tmp_path / "delta")
    again = build(format)
    api.load(folder, again)
    torch.testing.assert_close(kin.logits(again, kin.batch()), before, rtol=0, atol=0)
    plain = build(None)
    with pytest.raises(BackboneMismatchError, match=f"kept as plain numbers, not as {format}"):
        api.load(folder, plain)
    api.load(folder, plain, across_formats=True).merge()
    # The other way round, and never onto another architecture.
    other = api.save(api.attach(build(None), "lora(rank=2)"), tmp_path / "other")
    with pytest.raises(BackboneMismatchError, match=f"kept as {format}, not as plain numbers"):
        api.load(other, build(format))
    api.load(other, build(format), across_formats=True)
    with pytest.raises(BackboneMismatchError, match="another architecture"):
        api.load(folder, build(None, "roberta"), across_formats=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_code_or_scale_is_another_backbone(format: str) -> None:
    model = build(format)
    delta = api.attach(model, "bitfit")
    path = next(link.site.path for link in delta.links if link.site.part == "up")
    known = backbone_of(delta)
    assert known == backbone_of(delta) == fingerprint(build(format)) == fingerprint(model)
    module = model.get_submodule(path)
    storage = storage_of(module)
    assert isinstance(storage, Quantised)
    for tensor in storage.stored(module):
        value = tensor.data.clone()
        tensor.view(-1)[0] += 1
        assert backbone_of(delta).weights != known.weights
        tensor.copy_(value)
        assert backbone_of(delta) == known


@pytest.mark.parametrize("format", FORMATS)
def test_a_life_on_a_quantised_base_leaves_it_as_it_was(format: str) -> None:
    kin, model = FAMILIES["bert"], build(format)
    untouched = fingerprint(model)
    delta = api.attach(model, "lora(rank=2) + bitfit + prefix(length=2)")
    move(delta)
    twin = copy.deepcopy(model)
    logits = kin.logits(model, kin.batch())
    torch.testing.assert_close(kin.logits(twin, kin.batch()), logits, rtol=0, atol=0)
    logits.sum().backward()
    with pytest.raises(UnsupportedError, match=f"kept as {format}.*merge it there"):
        api.attach(build(format), "lora").merge()
    delta.detach()
    assert fingerprint(model) == untouched
    bias = api.attach(model, "bitfit(create=False)")
    move(bias)
    wanted = kin.logits(model, kin.batch())
    bias.merge()  # biases are plain numbers
    torch.testing.assert_close(kin.logits(model, kin.batch()), wanted)
    bias.unmerge()
    bias.detach()
    assert fingerprint(model) == untouched


@pytest.mark.parametrize("format", FORMATS)
def test_full_tuning_is_refused(format: str) -> None:
    with pytest.raises(UnsupportedError, match=f"weights kept as {format} cannot be trained"):
        api.attach(build(format), "full")


def test_a_folded_weight_needs_the_own_forward_of_its_module() -> None:
    model = build("int8")
    module = model.get_submodule("bert.encoder.layer.1.output.dense")
    own = module.forward
    module.__dict__["forward"] = lambda x: own(x)
    kin = FAMILIES["bert"]
    delta = api.attach(model, "lora(rank=2, at='ffn.down')")
    kin.logits(model, kin.batch())  # what is added to the output needs no weight
    delta.detach()
    api.attach(model, "last_layer")
    with pytest.raises(UnsupportedError, match="kept as int8 cannot be computed with another"):
        kin.logits(model, kin.batch())


def test_a_backbone_is_loaded_quantised() -> None:
    backbone = load_backbone("t5-nano", quantise="int8")
    kinds = {path: type(module).__name__ for path, module in backbone.model.named_modules()}
    int8 = {path for path, kind in kinds.items() if kind == "Int8Linear"}
    assert {path.rpartition(".")[2] for path in int8} >= {"q", "k", "v", "o"}
    assert not any(path.endswith((".wo", "lm_head", "shared")) for path in int8)
    plain = load_architecture("t5-nano")
    assert count_parameters(plain) == count_parameters(backbone.model)
    planned = copy.deepcopy(plain)
    quantise(planned, "int8")  # without weights
    assert base_bytes(planned) == base_bytes(backbone.model) < base_bytes(plain)


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="int8"):
        quantise(build(None), "int9")
    with pytest.raises(StateError, match="kept as int8 already"):
        quantise(build("int8"), "int8")
    attached = build(None)
    api.attach(attached, "lora")
    with pytest.raises(StateError, match="before attaching"):
        quantise(attached, "int8")
    with pytest.raises(TargetError, match="quantises nothing"):
        quantise(build(None, "t5"), "int8", at="ffn.down")
    with pytest.raises(UnsupportedError, match="sharded or offloaded"):
        offloaded = build(None)
        offloaded.get_submodule("bert.encoder.layer.0.output.dense")._hf_hook = object()
        quantise(offloaded, "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ConfigurationError, match=r"deltatune\[quantised\]"):
        quantise(build(None), "nf4")


def test_nf4_needs_weights() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    with pytest.raises(UnsupportedError, match="has none yet"):
        quantise(load_architecture("t5-nano"), "nf4")


def test_a_model_that_transformers_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
    from bitsandbytes import functional
    from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

    # Where the processor has AVX512-BF16, bitsandbytes lays codes out in whole blocks of 64, and
    # infers in bf16 but trains in fp32: there both sides are compared without gradients alone.
    compared = [torch.no_grad, *([] if functional.has_avx512bf16() else [torch.enable_grad])]
    widths, plain_head = {"hidden_size": 64, "intermediate_size": 128}, {}
    if functional.has_avx512bf16():  # nor can it infer with a head of fewer outputs than 32
        plain_head = {"llm_int8_skip_modules": ["classifier"]}
    wide = BertConfig(**{**build(None).config.to_dict(), **widths})
    BertForSequenceClassification(wide).save_pretrained(tmp_path)
    for config, format in (
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **plain_head), "nf4"),
        (BitsAndBytesConfig(load_in_8bit=True), "llm_int8"),
    ):

        def load(config: Any = config) -> nn.Module:
            made: nn.Module = BertForSequenceClassification.from_pretrained(
                tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
            )
            return made

        kin = FAMILIES["bert"]
        for mode in compared:
            model = load()
            assert format_of(model) == format
            with mode():
                before = kin.logits(model, kin.batch())
                api.attach(model, "lora(rank=2)")
                found = kin.logits(model, kin.batch())
            torch.testing.assert_close(found, before, rtol=0, atol=0)
        model = load()
        delta = api.attach(model, "lora(rank=2)")
        kin.logits(model, kin.batch()).sum().backward()
        assert delta.bank.slots[0].grad is not None
