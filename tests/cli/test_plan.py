from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune import api
from deltatune.backbones.load import load_architecture

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    named = BertConfig(**sizes, num_hidden_layers=4, vocab_size=100, architectures=["BertModel"])
    (folder / "config.json").write_text(named.to_json_string(use_diff=False))
    return str(folder / "config.json")


def test_the_json_is_the_plan(config: str, call: Call) -> None:
    words = ("plan", "--backbone", config, "--method", "lora(rank=2)")
    code, out, err = call(*words, "--at", "attention.q|attention.v", "--json")
    found, plan = json.loads(out), api.plan(config, "lora(rank=2)", "attention.q|attention.v")
    assert code == 0, err
    assert found["trainable"] == plan.trainable == 4 * 2 * 2 * (32 + 32)
    assert found["stored"] == plan.stored and found["base"] == plan.base
    assert found["ratio_base"] == plan.ratio_base and found["ratio_total"] == plan.ratio_total
    assert len(found["sites"]) == 8
    assert found["sites"][0]["shapes"] == {"A": [2, 32], "B": [32, 2]}
    assert sum(site["count"] for site in found["sites"]) == found["trainable"]


def test_the_tree_folds_blocks_and_marks_sites(config: str, call: Call) -> None:
    code, out, _ = call(
        "plan", "--backbone", config, "--method", "lora(rank=2) + bitfit(at='norm')"
    )
    assert code == 0
    assert "0-3 (4 alike) BertLayer" in out
    assert out.count("query Linear") == 1, "alike blocks are drawn once"
    assert re.search(r"query Linear  weight 32x32, bias 32  \+ lora A 2x32, B 32x2 = 128", out)
    assert re.search(r"LayerNorm LayerNorm .* \+ bitfit bias 32 = 32", out)
    assert "Dropout" not in out
    plan = api.plan(load_architecture(config), "lora(rank=2) + bitfit(at='norm')")
    assert f"trainable {plan.trainable:,} of {plan.base:,}" in out
    assert f"{len(plan.sites)} sites" in out


def test_blocks_that_differ_are_drawn_apart(config: str, call: Call) -> None:
    _, out, _ = call("plan", "--backbone", config, "--method", "lora(at='block[1].attention.q')")
    assert re.search(r"─ 0 BertLayer", out) and re.search(r"─ 1 BertLayer", out)
    assert "2-3 (2 alike) BertLayer" in out


def test_a_target_without_a_match_is_one_line(config: str, call: Call) -> None:
    code, out, err = call("plan", "--backbone", config, "--method", "lora", "--at", "atention.q")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "attention.q" in err


def test_a_file_holds_the_request(config: str, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(f"backbone: {config}\nmethod: lora(rank=4)\n")
    _, out, _ = call("plan", "--config", str(file), "--set", "method=lora(rank=1)", "--json")
    assert json.loads(out)["method"] == "lora(rank=1)"
