"""A classifier on the sentence vector: what it reads, and which checkpoints get one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertModel

from deltatune import api
from deltatune.backbones.ladder import TOKENIZER
from deltatune.backbones.load import load_architecture, load_backbone
from deltatune.backbones.sentence import POOLINGS, SentenceClassifier
from deltatune.core.errors import ConfigurationError, UnsupportedError

BERT = BertConfig(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    vocab_size=8192,
    max_position_embeddings=32,
)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as sentence-transformers writes it, without a pooler."""
    torch.manual_seed(1)
    BertForMaskedLM(BERT).save_pretrained(tmp_path)
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    pool(tmp_path, "mean_tokens")
    return tmp_path


def pool(folder: Path, *names: str) -> None:
    settings = {f"pooling_mode_{name}": name in names for name in {*POOLINGS, *names}}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    text = json.dumps({"word_embedding_dimension": 8, "include_prompt": True, **settings})
    (folder / "1_Pooling" / "config.json").write_text(text)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_reads_the_pooled_tokens(folder: Path, pooling: str) -> None:
    pool(folder, pooling)
    backbone = load_backbone(str(folder), labels=3)
    model = backbone.model
    assert isinstance(model, SentenceClassifier)
    batch = backbone.tokenizer(["one", "a longer line"], padding=True, return_tensors="pt")
    hidden = BertModel.from_pretrained(folder, add_pooling_layer=False)(**batch).last_hidden_state
    rows = [h[: int(m.sum())] for h, m in zip(hidden, batch["attention_mask"], strict=True)]
    taken = {
        "mean_tokens": [row.mean(0) for row in rows],
        "cls_token": [row[0] for row in rows],
        "max_tokens": [row.amax(0) for row in rows],
    }
    torch.testing.assert_close(model(**batch).logits, model.classifier(torch.stack(taken[pooling])))


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    left=st.booleans(),
    name=st.sampled_from(sorted(POOLINGS)),
)
def test_padding_is_never_pooled(lengths: list[int], left: bool, name: str) -> None:
    longest = max(lengths)
    hidden = torch.randn(len(lengths), longest, 4)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if left else place < n for n in lengths]).long()
    alone = [
        POOLINGS[name](h[m == 1][None], m[m == 1][None]) for h, m in zip(hidden, mask, strict=True)
    ]
    torch.testing.assert_close(POOLINGS[name](hidden, mask), torch.cat(alone))


def test_without_a_mask_every_token_counts(folder: Path) -> None:
    model = load_backbone(str(folder), labels=3).model
    ids = torch.tensor([[5, 6, 7]])
    masked = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(ids).logits, masked)


def test_the_body_is_the_checkpoint_and_the_head_is_seeded(folder: Path) -> None:
    first, second = (load_backbone(str(folder), labels=3).model for _ in range(2))
    body = dict(BertModel.from_pretrained(folder, add_pooling_layer=False).named_parameters())
    assert {n: p.shape for n, p in first.base_model.named_parameters()} == {
        n: p.shape for n, p in body.items()
    }
    assert all(torch.equal(p, body[n]) for n, p in first.base_model.named_parameters())
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.classifier.weight.std() > 0


def test_without_labels_or_pooling_nothing_changes(folder: Path) -> None:
    assert isinstance(load_backbone(str(folder)).model, BertModel)
    (folder / "modules.json").write_text(json.dumps(MODULES[:1]))
    with pytest.raises(ConfigurationError, match="pooler"):
        load_backbone(str(folder), labels=3)


def test_the_architecture_is_the_same(folder: Path) -> None:
    real = load_backbone(str(folder), labels=3).model
    bare = load_architecture(str(folder), labels=3)
    assert type(bare) is SentenceClassifier
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {n: p.shape for n, p in real.named_parameters()} == {
        n: p.shape for n, p in bare.named_parameters()
    }


@pytest.mark.parametrize(
    ("labels", "values"), [(1, torch.tensor([0.5, 2.0])), (3, torch.tensor([0, 2]))]
)
def test_the_loss_is_that_of_the_task(folder: Path, labels: int, values: torch.Tensor) -> None:
    backbone = load_backbone(str(folder), labels=labels)
    batch = backbone.tokenizer(["one", "a longer line"], padding=True, return_tensors="pt")
    output = backbone.model(**batch, labels=values)
    expected = (
        torch.nn.functional.mse_loss(output.logits[:, 0], values)
        if labels == 1
        else torch.nn.functional.cross_entropy(output.logits, values)
    )
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    "method", ["lora", "adapter", "bitfit", "prefix", "prompt", "last_layer", "full"]
)
def test_every_arm_attaches_and_gives_the_same_back(folder: Path, method: str) -> None:
    backbone = load_backbone(str(folder), labels=3)
    batch = backbone.tokenizer(["one", "a longer line"], padding=True, return_tensors="pt")
    before = backbone.model(**batch).logits
    delta = api.attach(backbone.model, method if method == "full" else f"{method}+head(labels=3)")
    loss = backbone.model(**batch, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(slot.grad is not None and slot.grad.abs().sum() > 0 for slot in delta.bank.slots)
    delta.detach()
    assert torch.equal(backbone.model(**batch).logits, before)


@pytest.mark.parametrize("names", [(), ("mean_tokens", "max_tokens"), ("lasttoken",)])
def test_other_poolings_are_refused(folder: Path, names: tuple[str, ...]) -> None:
    pool(folder, *names)
    with pytest.raises(UnsupportedError, match="mean_tokens, cls_token, max_tokens"):
        load_backbone(str(folder), labels=3)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"type": "x.Pooling"}]', '{"a": 1}'])
def test_a_damaged_description_is_refused(folder: Path, text: str) -> None:
    (folder / "modules.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"modules\.json"):
        load_backbone(str(folder), labels=3)
