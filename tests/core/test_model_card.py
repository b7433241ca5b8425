"""The page beside an artefact: what it says, and that it stays a page whoever wrote the facts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import deltatune as dt
from deltatune.core.artefact import CARD, read, save
from deltatune.core.model_card import model_card
from deltatune.testing.families import FAMILIES

FACTS: dict[str, Any] = {
    "backbone": "minilm",
    "licence": "apache-2.0",
    "task": "trec",
    "task_version": "1",
    "protocol": "clean",
    "rows": "abc",
    "counts": {"train": 800, "test": 400},
    "seed": 3,
    "budget": "160 steps",
    "settings": {"learning_rate": 0.001},
    "head_width": 6,
    "trainable": 1234,
    "test": {"ACC": 0.9, "F1": 0.8, "odd": None},
    "versions": {"torch": "2"},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["bert"].build()


def page(model: nn.Module, folder: Path, facts: dict[str, Any], **measured: Any) -> str:
    delta = dt.attach(model, "lora(rank=2)", seed=1)
    save(delta, folder, facts=facts, measured=measured)
    delta.detach()
    return (folder / CARD).read_text(encoding="utf-8")


def test_a_card_says_what_was_measured(model: nn.Module, tmp_path: Path) -> None:
    text = page(model, tmp_path / "a", FACTS, seconds=12.34, memory=3 << 20, device="cpu")
    artefact = read(tmp_path / "a")
    for said in (
        "# lora(rank=2) for minilm",
        "| Licence of the backbone | apache-2.0 |",
        f"{artefact.backbone.parameters:,} parameters",
        "| Trained | 1,234 numbers |",
        "| Task | trec version 1, protocol clean |",
        "| Rows | 800 train, 400 test, content `abc` |",
        "ACC 0.9000 (standard error 0.0150 over 400 rows), F1 0.8000, odd unknown",
        "| Run | 160 steps, seed 3, learning rate 0.001 |",
        "| Took | 12.3 s of training, at most 3 MiB, on cpu |",
        "| Made with | torch 2 |",
        f"sha256 `{artefact.digest}`",
        "dt.load_backbone('minilm', labels=6)",
    ):
        assert said in text, said


def test_what_differs_from_run_to_run_is_on_the_card_alone(
    model: nn.Module, tmp_path: Path
) -> None:
    one = page(model, tmp_path / "a", FACTS, seconds=1.0)
    other = page(model, tmp_path / "b", FACTS, seconds=2.0)
    assert one != other
    assert (tmp_path / "a" / "delta.json").read_bytes() == (
        tmp_path / "b" / "delta.json"
    ).read_bytes()
    artefact = read(tmp_path / "a")
    assert model_card(artefact, {"seconds": 1.0, "device": "unknown"}) == one


def test_a_delta_without_facts_has_a_card_and_is_overwritten_with_it(
    model: nn.Module, tmp_path: Path
) -> None:
    delta = dt.attach(model, "bitfit")
    dt.save(delta, tmp_path / "a")
    dt.save(delta, tmp_path / "a", overwrite=True, facts={"task": "mine"})
    delta.detach()
    text = (tmp_path / "a" / CARD).read_text(encoding="utf-8")
    assert "| Task | mine |" in text and "Scores" not in text and "unknown" not in text
    dt.load(tmp_path / "a", model).detach()


@pytest.mark.parametrize(
    "odd", ["x\n\n# Title <script>alert(1)</script> | [a](b) `c`", 3, None, {}]
)
def test_facts_of_any_form_stay_within_their_row(
    model: nn.Module, tmp_path: Path, odd: object
) -> None:
    facts = dict.fromkeys((*FACTS, "origin"), odd) | {"test": {"a|b\n": 1.0, "c": odd}}
    text = page(model, tmp_path / "a", facts)
    assert "<script" not in re.sub("`[^`]*`", "", text) and "\n# Title" not in text
    lines = text.splitlines()
    table = lines[2 : lines.index("## How to load") - 1]
    assert all(line.startswith("|") and line.endswith("|") for line in table)
    assert all(line.replace("\\|", "").count("|") == 3 for line in table)
