"""Folders that AdapterHub and OpenDelta write, with what their models give: test fixtures.

Neither peer can be imported beside today's transformers, so that each runs in an environment of
its own, which knows nothing of deltatune:

    pip install adapters==1.2.0                                  # brings transformers 4.51
    python scripts/peer_folders.py adapterhub tests/interop/peers

    pip install transformers==4.33.3 'numpy<2' 'setuptools<81' datasets decorator gitpython \\
        pyyaml rich scipy tqdm web.py yacs
    pip install --no-deps opendelta==0.3.2 bigmodelvis
    python scripts/peer_folders.py opendelta tests/interop/peers

The first also writes the backbones (`backbones/FAMILY`), which the second reads. Of each case it
writes the folder as the peer saves it (`PEER/FAMILY/CASE`), every tensor moved from where it began,
and into `PEER/FAMILY.safetensors` the inputs and the logits of all its cases. Each of the three is
one archive: the folders are many and small.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

VOCABULARY = 32
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BLOCKS = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}


def configuration(family: str) -> Any:
    encoder = {**SMALL, **BLOCKS, **STEADY, "num_labels": 3, "max_position_embeddings": 12}
    if family == "bert":
        return transformers.BertConfig(**encoder, type_vocab_size=1)
    if family == "roberta":
        return transformers.RobertaConfig(**encoder, type_vocab_size=1)
    if family == "t5":
        return transformers.T5Config(
            **SMALL,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            relative_attention_num_buckets=8,
        )
    if family == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12, "n_inner": 12}
        return transformers.GPT2Config(**SMALL, **sizes, **quiet, initializer_range=0.2)
    return transformers.LlamaConfig(**SMALL, **BLOCKS, max_position_embeddings=12)


def build(family: str) -> nn.Module:
    """A random backbone whose norms and biases are none of the usual ones."""
    torch.manual_seed(7)
    model = getattr(transformers, CLASSES[family])(configuration(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()) + len(name)))
    return model.eval()


def loaded(family: str) -> Any:
    kind = getattr(transformers, CLASSES[family])
    eager = {"attn_implementation": "eager"} if transformers.__version__ >= "4.36" else {}
    return kind.from_pretrained(f"backbones/{family}", **eager).eval()


def batch(family: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if family == "t5":
        found["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 3), generator=random)
    return found


def logits(family: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**{name: value.clone() for name, value in batch(family).items()}).logits


def move(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Away from where they began, all by the same draw.

    A product of reflections keeps its diagonal: torch reads it as whole numbers, so that any that
    is not 1 or -1 is nothing.
    """
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in parameters:
            step = 0.2 * torch.randn(parameter.shape, generator=random)
            if name.endswith("parametrizations.weight.original"):
                step.fill_diagonal_(0)
            parameter.add_(step)


def write_backbones() -> None:
    for family in CLASSES:
        folder = Path("backbones") / family
        model = build(family)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)


# AdapterHub.

# Its Llama computes something else than transformers' before anything is added: one case shows it.
EVERY = ("bert", "roberta", "t5", "gpt2")


def hub_cases() -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """The name of a case, its configuration, and the families."""
    import adapters as a

    bn = {"reduction_factor": 4}
    yield "seq_bn", a.SeqBnConfig(**bn), EVERY
    yield "double_seq_bn", a.DoubleSeqBnConfig(**bn), EVERY
    yield "cross", a.DoubleSeqBnConfig(**bn, cross_adapter=True), ("t5",)
    yield "par_bn", a.ParBnConfig(**bn), ("bert", "roberta", "gpt2")
    yield "scaled_par_bn", a.ParBnConfig(**bn, mh_adapter=True, scaling="learned"), ("bert",)
    plus = a.AdapterPlusConfig(**bn, stochastic_depth=0.0)
    yield "adapter_plus", plus, ("bert", "gpt2")
    yield "seq_bn_inv", a.SeqBnInvConfig(**bn), ("bert", "gpt2")
    yield "double_seq_bn_inv", a.DoubleSeqBnInvConfig(**bn), ("bert", "gpt2", "t5")
    by_layer = {"0": 8, "default": 2}
    leave = a.DoubleSeqBnConfig(reduction_factor=by_layer, leave_out=[1], non_linearity="relu")
    yield "leave_out", leave, ("bert", "t5")
    yield "ln_after", a.DoubleSeqBnConfig(**bn, ln_after=True), ("bert",)
    yield "gated", a.DoubleSeqBnConfig(**bn, use_gating=True), ("bert",)
    phm = {"reduction_factor": 4, "phm_dim": 2, "phm_init_range": 1.0}
    yield "compacter", a.CompacterConfig(**phm), ("bert", "gpt2")
    yield "compacter++", a.CompacterPlusPlusConfig(**phm), ("bert", "gpt2", "t5")
    yield "lora", a.LoRAConfig(r=2, alpha=6), (*EVERY, "llama")
    wide = a.LoRAConfig(
        r=2, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    )
    yield "lora_wide", wide, ("bert", "gpt2", "t5")
    yield "ia3", a.IA3Config(), EVERY
    yield "vera", a.VeraConfig(r=3, alpha=6), ("bert", "t5")
    yield "mtl_lora", a.MTLLoRAConfig(r=2), ("bert",)
    prefix = {"prefix_length": 3, "bottleneck_size": 4}
    yield "prefix_tuning", a.PrefixTuningConfig(**prefix), EVERY
    yield "prefix_tuning_flat", a.PrefixTuningConfig(**prefix, flat=True), ("gpt2",)
    yield "prompt_tuning", a.PromptTuningConfig(prompt_length=3), ("bert",)
    yield (
        "loreft",
        a.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
        ("bert", "roberta", "gpt2"),
    )
    yield "tied_loreft", a.LoReftConfig(r=2, suffix_positions=3, tied_weights=True), ("bert",)
    yield "noreft", a.NoReftConfig(r=2), ("bert",)
    yield "direft", a.DiReftConfig(r=2), ("bert",)
    union = a.ConfigUnion(a.LoRAConfig(r=2), a.DoubleSeqBnConfig(**bn))
    yield "union", union, ("bert", "gpt2")
    mam = a.MAMConfig(a.PrefixTuningConfig(**prefix), a.ParBnConfig(**bn))
    yield "mam", mam, ("bert",)
    unipelt = a.UniPELTConfig(
        a.PrefixTuningConfig(**prefix), a.SeqBnConfig(**bn), a.LoRAConfig(r=2)
    )
    yield "unipelt", unipelt, ("gpt2",)


def write_adapterhub() -> None:
    import adapters

    write_backbones()
    found: dict[str, dict[str, Tensor]] = {family: dict(batch(family)) for family in CLASSES}
    for name, kind, families in hub_cases():
        for family in families:
            model = loaded(family)
            adapters.init(model)
            found[family][name] = hub_saved(
                model, family, name, kind, Path("adapterhub") / family / name
            )
    pickled = Path("adapterhub") / "bert" / "pickled"
    model = loaded("bert")
    adapters.init(model)
    kind = adapters.LoRAConfig(r=2, alpha=6)
    found["bert"]["pickled"] = hub_saved(model, "bert", "pickled", kind, pickled, safe=False)
    write_heads(found["bert"])
    plain = loaded("llama")
    adapters.init(plain)
    found["llama"]["nothing_added"] = logits("llama", plain)
    for family, tensors in found.items():
        save_file(tensors, Path("adapterhub") / f"{family}.safetensors")


def hub_saved(
    model: Any, family: str, name: str, kind: Any, folder: Path, safe: bool = True
) -> Tensor:
    torch.manual_seed(5)
    model.add_adapter("own", config=kind)
    model.train_adapter("own")
    held = {
        key for key in model.state_dict() if ".own." in key
    }  # what the peer itself picks out of a model by name
    move((key, p) for key, p in model.named_parameters() if key in held)
    model.eval()
    model.set_active_adapters("own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    safe = safe and not any("prefix_tunings" in key for key in held)  # theirs share memory
    model.save_adapter(str(folder), "own", with_head=False, use_safetensors=safe)
    if name == "mtl_lora":
        return torch.zeros(1)  # a call names tasks
    made = logits(family, model)
    return made[:, -7:].contiguous() if family in ("gpt2", "llama") else made.contiguous()


def write_heads(found: dict[str, Tensor]) -> None:
    """Two heads of AdapterHub's own kinds beside a LoRA, on a model that has no head itself."""
    import adapters

    for name, layers in (("head_two_layers", 2), ("head_one_layer", 1)):
        backbone = "backbones/bert"
        model = adapters.AutoAdapterModel.from_pretrained(backbone, attn_implementation="eager")
        torch.manual_seed(5)
        model.add_adapter("own", config=adapters.LoRAConfig(r=2, alpha=6))
        model.add_classification_head("own", num_labels=3, layers=layers)
        model.train_adapter("own")
        move((key, p) for key, p in model.named_parameters() if ".own." in key)
        model.eval()
        folder = Path("adapterhub") / "bert" / name
        model.save_adapter(str(folder), "own", with_head=True, use_safetensors=True)
        found[name] = logits("bert", model).contiguous()


# OpenDelta.


def open_cases() -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """The name of a case, OpenDelta's class, its arguments, and the families."""
    small = {"bottleneck_dim": 2}
    yield "adapter", "AdapterModel", small, ("bert", "roberta", "gpt2", "t5")
    named = {**small, "modified_modules": ["mlp.down_proj"], "non_linearity": "relu"}
    yield "adapter", "AdapterModel", named, ("llama",)
    yield "lora", "LoraModel", {"lora_r": 2, "lora_alpha": 6}, ("bert", "roberta", "t5")
    yield (
        "lora",
        "LoraModel",
        {"lora_r": 2, "modified_modules": ["q_proj", "0.mlp.up_proj"]},
        ("llama",),
    )
    yield "low_rank_adapter", "LowRankAdapterModel", {"reduction_factor": 4}, ("bert", "t5")
    phm = {"reduction_factor": 4, "hypercomplex_division": 2, "phm_init_range": 1.0}
    yield "compacter", "CompacterModel", phm, ("bert", "gpt2")
    ffn = {**small, "modified_modules": ["ff@.w1@", "ff@.w2@"], "common_structure": True}
    yield "parallel_ffn", "ParallelAdapterModel", ffn, ("bert", "t5")
    yield "parallel_adapter", "ParallelAdapterModel", small, ("bert", "gpt2")
    yield "bitfit", "BitFitModel", {}, ("bert", "gpt2", "t5")
    flat = {"prefix_token_num": 3, "reparameterize": False}
    yield "prefix", "PrefixModel", flat, ("bert", "gpt2", "t5")
    made = {"prefix_token_num": 3, "embed_dim": 4, "mid_dim": 4}
    yield "prefix_made", "PrefixModel", made, ("bert", "gpt2")
    yield "soft_prompt", "SoftPromptModel", {"soft_token_num": 3}, ("bert", "t5", "gpt2")
    head = {"lora_r": 2, "unfrozen_modules": ["deltas", "classifier", "layer_norm@"]}
    yield "lora_and_head", "LoraModel", {**head, "common_structure": True,
        "modified_modules": ["attn@.q@"]}, ("bert",)  # fmt: skip


def write_opendelta() -> None:
    # The client of a cloud that is gone, which OpenDelta imports and needs for nothing here.
    sys.modules["DeltaCenter"] = types.SimpleNamespace(OssClient=None)  # type: ignore[assignment]
    import opendelta

    found: dict[str, dict[str, Tensor]] = {family: dict(batch(family)) for family in CLASSES}
    for name, kind, fields, families in open_cases():
        for family in families:
            model = loaded(family)
            torch.manual_seed(5)
            try:
                delta = getattr(opendelta, kind)(backbone_model=model, **fields)
                delta.freeze_module(exclude=fields.get("unfrozen_modules"), set_state_dict=True)
                move((key, p) for key, p in model.named_parameters() if p.requires_grad)
                model.eval()
                made = logits(family, model)
            except Exception as error:  # what the peer itself cannot do is no case
                print(f"opendelta {family} {name}: {type(error).__name__}: {error}")
                continue
            made = made[:, -7:] if family in ("gpt2", "llama") else made
            found[family][name] = made.contiguous()
            delta.save_finetuned(str(Path("opendelta") / family / name))
    for family, tensors in found.items():
        save_file(tensors, Path("opendelta") / f"{family}.safetensors")


WRITERS: dict[str, Callable[[], None]] = {
    "adapterhub": write_adapterhub,
    "opendelta": write_opendelta,
}


def main(peer: str, target: Path) -> None:
    """Writes in a folder of its own, since what is saved names the backbone by its path."""
    target = target.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if peer != "adapterhub":
            shutil.unpack_archive(target / "backbones.tar.xz", ".", filter="data")
        WRITERS[peer]()
        for name in ("backbones", peer) if peer == "adapterhub" else (peer,):
            shutil.make_archive(str(target / name), "xztar", ".", name, owner="root", group="root")
        os.chdir(target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
