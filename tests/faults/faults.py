"""What goes wrong in silence elsewhere, and what happens here instead, shown by running it.

A fault is a function that does here what goes wrong elsewhere, asserts the clear behaviour and says
it in a few words. What PEFT does is run too wherever `on_peft` follows; the other cells are notes
of runs of PEFT 0.21.2, `adapters` 1.2 (transformers 4.57.6) and OpenDelta 0.3.2 (with two shims).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deltatune import api
from deltatune.core.artefact import read
from deltatune.core.errors import (
    ArtefactError,
    BackboneMismatchError,
    ConfigurationError,
    StateError,
    TargetError,
    UnknownNameError,
)
from deltatune.testing.case import close, move
from deltatune.testing.families import FAMILIES

Ours = Callable[[Path], str]


@dataclass
class Fault:
    """One row of the table."""

    title: str
    ours: Ours
    peft: str
    adapters: str
    opendelta: str
    on_peft: Ours | None = None


FAULTS: dict[str, Fault] = {}
NONE = "–"  # the library has no such thing, or it was not run


def fault(title: str, *, peft: str = NONE, adapters: str = NONE, opendelta: str = NONE) -> Any:
    def add(ours: Ours) -> Ours:
        FAULTS[ours.__name__] = Fault(title, ours, peft, adapters, opendelta)
        return ours

    return add


def on_peft(ours: Ours) -> Any:
    def add(check: Ours) -> Ours:
        FAULTS[ours.__name__].on_peft = check
        return check

    return add


def llama(**changes: Any) -> PreTrainedModel:
    """The miniature Llama, changed in its configuration."""
    model = FAMILIES["llama"].build()
    if not changes:
        return model
    config = model.config.__class__(**{**model.config.to_dict(), **changes})
    torch.manual_seed(8)
    other: PreTrainedModel = type(model)(config).eval()
    return other


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**FAMILIES["llama"].batch()).logits
    return found


def saved(folder: Path, method: str = "lora(rank=2)") -> Path:
    """A delta of the miniature Llama."""
    delta = api.attach(llama(), method)
    move(delta)
    return api.save(delta, folder / "ours")


def peft_saved(folder: Path, **more: Any) -> Path:
    """The same by PEFT."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more
    )
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    model.save_pretrained(folder / "peft")
    return folder / "peft"


def peft_loaded(model: PreTrainedModel, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, folder)


def refused(kind: type[Exception], match: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=match):
        call()


# Reach.


@fault("prompt tuning on T5", peft="works", adapters="error", opendelta="works")
def prompt_on_t5(folder: Path) -> str:
    model = FAMILIES["t5"].build()
    delta = api.attach(model, "prompt(length=3)")
    model(**FAMILIES["t5"].batch()).logits.sum().backward()
    assert delta.bank.slots[0].grad is not None
    return "works"


@fault(
    "bottleneck adapters",
    peft="none",
    adapters="works",
    opendelta="works; no cross-attention of T5",
)
def bottleneck_adapters(folder: Path) -> str:
    for method in ("adapter", "pfeiffer", "parallel"):
        assert api.plan(FAMILIES["t5"].build(), method).trainable > 0
    return "works"


@fault(
    "BitFit, last-layer and selective-module tuning",
    peft="none",
    adapters="none",
    opendelta="BitFit",
)
def specification(folder: Path) -> str:
    for method in ("bitfit", "last_layer", "selective_module"):
        assert api.plan(FAMILIES["t5"].build(), method).trainable > 0
    return "works"


@fault(
    "counts and sites before anything is changed, without weights",
    peft="no",
    adapters="no",
    opendelta="no",
)
def counts_without_weights(folder: Path) -> str:
    with torch.device("meta"):
        model = type(llama())(llama().config)
    found = api.plan(model, "lora + adapter")
    assert found.trainable == api.attach(llama(), "lora + adapter").bank.numel
    return "yes"


# Loading.


@fault(
    "loaded on the same network with other weights",
    peft="loads",
    adapters="loads",
    opendelta="logs a line",
)
def other_weights(folder: Path) -> str:
    place, other = saved(folder), llama()
    torch.nn.init.normal_(other.lm_head.weight)
    refused(BackboneMismatchError, "other weights", lambda: api.load(place, other))
    return "refused: other weights"


@on_peft(other_weights)
def other_weights_peft(folder: Path) -> str:
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight)
    before = logits(other)
    assert not torch.equal(logits(peft_loaded(other, peft_saved(folder))), before)
    return "loads"


@fault("loaded on another family of the same shapes (Qwen2 for Llama)", peft="loads")
def other_family(folder: Path) -> str:
    place = saved(folder)
    refused(
        BackboneMismatchError, "architecture", lambda: api.load(place, FAMILIES["qwen2"].build())
    )
    return "refused: another architecture"


@on_peft(other_family)
def other_family_peft(folder: Path) -> str:
    peft_loaded(FAMILIES["qwen2"].build(), peft_saved(folder))
    return "loads"


@fault("loaded on fewer layers", peft="drops the rest", adapters="loads")
def fewer_layers(folder: Path) -> str:
    place = saved(folder)
    refused(
        BackboneMismatchError, "architecture", lambda: api.load(place, llama(num_hidden_layers=1))
    )
    return "refused: another architecture"


@on_peft(fewer_layers)
def fewer_layers_peft(folder: Path) -> str:
    peft_loaded(llama(num_hidden_layers=1), peft_saved(folder))
    return "drops the rest"


@fault("a prompt loaded on a model of another width", peft="loads, crashes at the first forward")
def other_width(folder: Path) -> str:
    place = saved(folder, "prompt(length=3)")
    refused(BackboneMismatchError, "architecture", lambda: api.load(place, llama(hidden_size=64)))
    return "refused: another architecture"


@fault(
    "the vocabulary was resized before training: new rows are neither trained nor saved",
    peft="loads",
)
def resized_vocabulary(folder: Path) -> str:
    model = llama()
    model.resize_token_embeddings(100, mean_resizing=False)
    place = api.save(api.attach(model, "lora"), folder / "ours")
    refused(BackboneMismatchError, "architecture", lambda: api.load(place, llama()))
    return "refused: another architecture"


def rewritten(place: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(place / name)
    change(tensors)
    save_file(tensors, place / name)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


@fault(
    "a tensor is missing from the file", peft="`load_adapter` says nothing", adapters="a log line"
)
def missing_tensor(folder: Path) -> str:
    place = saved(folder)
    rewritten(place, "delta.safetensors", _drop)
    refused(ArtefactError, "bytes|digest|damaged|differ", lambda: api.load(place, llama()))
    return "refused: the file is not what its description says"


@on_peft(missing_tensor)
def missing_tensor_peft(folder: Path) -> str:
    place = peft_saved(folder)
    model = peft_loaded(llama(), place)
    rewritten(place, "adapter_model.safetensors", _drop)
    model.load_adapter(place, "second")
    return "`load_adapter` says nothing"


@fault("a value in the file was changed", peft="loads")
def changed_value(folder: Path) -> str:
    place = saved(folder)
    rewritten(place, "delta.safetensors", _add)
    refused(ArtefactError, "bytes|digest|damaged|differ", lambda: api.load(place, llama()))
    return "refused: the file is not what its description says"


@on_peft(changed_value)
def changed_value_peft(folder: Path) -> str:
    place = peft_saved(folder)
    rewritten(place, "adapter_model.safetensors", _add)
    peft_loaded(llama(), place)
    return "loads"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(first(tensors))


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)].add_(1)


@fault("`alpha` was changed in the description", peft="loads")
def changed_alpha(folder: Path) -> str:
    place = saved(folder)
    text = (place / "delta.json").read_text()
    (place / "delta.json").write_text(text.replace("lora(", "lora(alpha=800.0, ", 1))
    refused(ArtefactError, "digest|changed|damaged", lambda: api.load(place, llama()))
    return "refused: the description was changed"


@on_peft(changed_alpha)
def changed_alpha_peft(folder: Path) -> str:
    place = peft_saved(folder)
    file = place / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 800}))
    peft_loaded(llama(), place)
    return "loads"


@fault("a tensor holds NaN", peft="saves and loads")
def not_a_number(folder: Path) -> str:
    delta = api.attach(llama(), "lora(rank=2)")
    with torch.no_grad():
        delta.bank.slots[0][0] = torch.nan
    refused(ArtefactError, "not finite", lambda: api.save(delta, folder / "ours"))
    assert not (folder / "ours").exists()
    return "refused: values that are not finite"


@on_peft(not_a_number)
def not_a_number_peft(folder: Path) -> str:
    place = peft_saved(folder)
    rewritten(place, "adapter_model.safetensors", _spoil)
    peft_loaded(llama(), place)
    return "saves and loads"


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)].fill_(torch.nan)


@fault(
    "a delta that was loaded is trained on", peft="LoRA frozen unless asked; prompts: ValueError"
)
def trained_on(folder: Path) -> str:
    for method in ("lora(rank=2)", "prompt(length=3)"):
        model = llama()
        delta = api.load(saved(folder / method[:4], method), model)
        model(**FAMILIES["llama"].batch()).logits.sum().backward()
        assert delta.bank.slots[0].grad is not None
    return "it trains"


# Naming.


@fault("one of two targets matches nothing", peft="ignored", adapters="error", opendelta="ignored")
def half_a_target(folder: Path) -> str:
    refused(
        TargetError,
        "'vproj' matches nothing.*v_proj",
        lambda: api.attach(llama(), "lora", "q_proj | vproj"),
    )
    return "refused, with the nearest names"


@on_peft(half_a_target)
def half_a_target_peft(folder: Path) -> str:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "vproj"]))
    assert not any("v_proj" in name for name, _ in model.named_parameters() if "lora_" in name)
    return "ignored"


@fault("a layer is named that the model does not have", peft="ignored")
def layer_out_of_range(folder: Path) -> str:
    refused(
        TargetError,
        "matches nothing",
        lambda: api.attach(llama(), "lora", "block[0].attention.q | block[7].attention.q"),
    )
    return "refused"


@on_peft(layer_out_of_range)
def layer_out_of_range_peft(folder: Path) -> str:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 7])
    peft.get_peft_model(llama(), config)
    return "ignored"


@fault("a regular expression matches nothing, or is none", opendelta="nothing is adapted")
def bad_expression(folder: Path) -> str:
    for target in ("re:.*nothing", "re:("):
        refused(
            TargetError,
            "matches nothing|not a regular expression",
            lambda t=target: api.attach(llama(), "lora", t),
        )
    return "refused"


@fault("an argument that a method does not have", peft="error", opendelta="some are ignored")
def unknown_argument(folder: Path) -> str:
    refused(UnknownNameError, "rank", lambda: api.attach(llama(), "lora(ranks=4)"))
    return "refused, with the nearest names"


@fault("LoRA by default on GPT-2", peft="works", adapters="works", opendelta="adapts no module")
def lora_on_gpt2(folder: Path) -> str:
    assert len(api.plan(FAMILIES["gpt2"].build(), "lora").sites) == 4
    return "works"


@fault("a parallel adapter on Llama", opendelta="no parameters")
def parallel_on_llama(folder: Path) -> str:
    assert api.plan(llama(), "parallel").trainable > 0
    return "works"


@fault(
    "every attention of T5",
    peft="prefix: the decoder's only",
    opendelta="24 of 36: no cross-attention",
)
def every_attention_of_t5(folder: Path) -> str:
    model = FAMILIES["t5"].build()
    attentions = {
        site.name.rpartition(".")[0] for site in api.plan(model, "lora(at='attention.q')").sites
    }
    assert len(attentions) == 6
    ids = FAMILIES["t5"].batch()["input_ids"]
    before = model.get_encoder()(ids).last_hidden_state
    move(api.attach(model, "prefix(length=3)"))
    assert not torch.equal(model.get_encoder()(ids).last_hidden_state, before)
    return "encoder, decoder and cross-attention"


# What trains.


@fault(
    "a new classification head that nobody asked to train",
    peft="random and frozen without `task_type`",
    opendelta="frozen",
)
def frozen_head(folder: Path) -> str:
    from transformers import BertModel

    from deltatune.backbones.ladder import TOKENIZER
    from deltatune.backbones.load import load_backbone

    BertModel(FAMILIES["bert"].build().config).save_pretrained(folder / "bert")
    shutil.copytree(TOKENIZER, folder / "bert", dirs_exist_ok=True)
    model = load_backbone(str(folder / "bert"), labels=3).model
    with pytest.warns(UserWarning, match="classifier was drawn at random"):
        api.attach(model, "lora").detach()
    api.attach(model, "lora + head(labels=3)")
    return "a warning that names it; `dt.train` adds a head"


@fault(
    "nothing further is called after adding a delta",
    peft="it acts and trains",
    adapters="the base trains; the delta does not act",
)
def nothing_further(folder: Path) -> str:
    model = llama()
    before = logits(model)
    delta = api.attach(model, "lora")
    assert not any(p.requires_grad for p in model.parameters())
    move(delta)
    assert not torch.equal(logits(model), before)
    return "it acts, and it alone trains"


@fault("BitFit on a model without biases starts as", opendelta="another model: random biases")
def bitfit_without_biases(folder: Path) -> str:
    model = llama()
    before = logits(model)
    api.attach(model, "bitfit")
    assert torch.equal(logits(model), before)
    return "the model itself, bit for bit"


@fault(
    "a target more changes the initial values of the others", peft="yes: ablations are not paired"
)
def paired_draws(folder: Path) -> str:
    few, many = (
        api.attach(llama(), "lora", "attention.q"),
        api.attach(llama(), "lora", "attention.k | attention.q"),
    )
    assert all(torch.equal(value, many.tensors()[name]) for name, value in few.tensors().items())
    return "no: a draw depends on seed and place"


@on_peft(paired_draws)
def paired_draws_peft(folder: Path) -> str:
    peft = pytest.importorskip("peft")
    drawn = []
    for targets in (["v_proj"], ["q_proj", "v_proj"]):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=targets))
        drawn.append(dict(model.named_parameters()))
    name = next(n for n in drawn[0] if "lora_A" in n and "layers.1" in n)
    assert not torch.equal(drawn[0][name], drawn[1][name])
    return "yes: ablations are not paired"


@fault(
    "two methods at once",
    peft="error; wrapped twice, only the outer one trains and is saved",
    adapters="works",
)
def two_methods(folder: Path) -> str:
    model = llama()
    delta = api.attach(model, "lora(rank=2) + prefix(length=2)")
    move(delta)
    live = logits(model)
    fresh = llama()
    api.load(api.save(delta, folder / "ours"), fresh)
    assert torch.equal(logits(fresh), live)
    return "trained and saved as one"


# Batches, merging, leaving.


@fault(
    "rows of a batch through different deltas",
    peft="37 of 44 methods: every row gets the active one",
    adapters="wrong for DoRA, ReFT, prompts",
    opendelta="no",
)
def mixed_batch(folder: Path) -> str:
    for method in (
        "prompt(length=3)",
        "prefix(length=3)",
        "bitfit",
        "adapter(bottleneck=4)",
        "lora",
    ):
        model = llama()
        bank = api.attach(model, method, slots=2)
        move(bank)
        found = []
        for rows in ([0, 1, None, 1], [0] * 4, [1] * 4, [None] * 4):
            with bank.route(rows):
                found.append(logits(model))
        mixed, zero, one, base = found
        for row, expected in enumerate((zero, one, base, one)):
            mask = FAMILIES["llama"].batch()["attention_mask"][row].bool()
            close(mixed[row][mask], expected[row][mask])
    return "every method but `full`"


@on_peft(mixed_batch)
def mixed_batch_peft(folder: Path) -> str:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config)
    model.add_adapter("second", config)
    batch = FAMILIES["llama"].batch()
    with torch.no_grad():
        plain = model(**batch).logits
        mixed = model(**batch, adapter_names=["default", "second", "default", "second"]).logits
    assert torch.equal(plain, mixed)
    return "37 of 44 methods: every row gets the active one"


@fault("merged and unmerged twenty times in bf16", peft="drifts (up to 0.08)", opendelta="no merge")
def merge_drift(folder: Path) -> str:
    model = llama().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta = api.attach(model, "lora(rank=2)")
    move(delta)
    for _ in range(20):
        delta.merge()
        delta.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return "the same bits"


@on_peft(merge_drift)
def merge_drift_peft(folder: Path) -> str:
    place = peft_saved(folder)
    model = peft_loaded(llama().to(torch.bfloat16), place)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return "drifts (up to 0.08)"


@fault(
    "the model after the delta is taken off",
    peft="every parameter stays frozen",
    adapters="classes stay replaced",
    opendelta="restored, BitFit not",
)
def taken_off(folder: Path) -> str:
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    api.attach(model, "lora").detach()
    assert [p.requires_grad for p in model.parameters()] == flags and type(model) is type(llama())
    return "as it was: bytes, flags, classes, hooks"


@on_peft(taken_off)
def taken_off_peft(folder: Path) -> str:
    model = peft_loaded(llama(), peft_saved(folder)).unload()
    assert not any(p.requires_grad for p in model.parameters())
    return "every parameter stays frozen"


@fault("`copy.deepcopy` of a model with a delta", opendelta="computes with the original's weights")
def deep_copy(folder: Path) -> str:
    import copy

    model = llama()
    move(api.attach(model, "lora"))
    other = copy.deepcopy(model)
    live = logits(other)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert torch.equal(logits(other), live)
    return "a model of its own"


@fault("attached again after it was taken off", peft="works", opendelta="NotImplementedError")
def attached_again(folder: Path) -> str:
    place, model = saved(folder), llama()
    before = logits(model)
    for _ in range(2):
        delta = api.load(place, model)
        live = logits(model)
        delta.detach()
    assert torch.equal(logits(model), before) and not torch.equal(live, before)
    return "works"


@fault(
    "`save_pretrained` of the base under a delta writes",
    peft="the delta alone",
    opendelta="the delta alone, as model.safetensors",
)
def base_is_saved(folder: Path) -> str:
    model = llama()
    move(api.attach(model, "lora"))
    model.save_pretrained(folder / "base")
    again = type(model).from_pretrained(folder / "base")
    assert torch.equal(logits(again), logits(llama()))
    return "the whole base, by its own names"


@fault(
    "a bf16 base",
    adapters="crashes unless a dtype is set",
    opendelta="BitFit crashes; cannot be saved",
)
def bf16_base(folder: Path) -> str:
    model = llama().to(torch.bfloat16)
    delta = api.attach(model, "lora + adapter(bottleneck=4) + bitfit + prefix(length=2)")
    assert logits(model).dtype == torch.bfloat16
    assert set(read(api.save(delta, folder / "ours")).tensors) == set(delta.tensors())
    return "works; leaves are fp32"


@fault("a routing that does not fit the batch", peft="error")
def routing_that_does_not_fit(folder: Path) -> str:
    model = llama()
    bank = api.attach(model, "lora", slots=2)
    with bank.route([0, 1, 0]):
        refused(ConfigurationError, "4 rows", lambda: logits(model))
    refused(StateError, "not routed", lambda: logits(model))
    return "refused"
