"""Several tasks in one cell: one delta for all, or one for each that shares leaves."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.standin import events
from transformers import BertConfig, BertModel

from deltatune import api
from deltatune.backbones.ladder import TOKENIZER
from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.study.cell import Cell, CellResult
from deltatune.training import Settings


def quick(**changed: Any) -> Settings:
    return Settings(
        **{"learning_rate": 1e-2, "per_device_batch_size": 4, "checkpoint_every": 5, **changed}
    )


OPTIONS = {"train_rows": 48, "validation_rows": 6, "test_rows": 6, "temperature": 2.0}


def test_embedded_tasks_are_learned_by_one_delta(tmp_path: Path) -> None:
    tasks = ["minimal_pairs", "docstring_package", "docstring_name"]
    result = api.train(
        "t5-nano",
        tasks,
        "lora(rank=4)",
        budget="36 steps",
        settings=quick(per_device_batch_size=8, checkpoint_every=20),
        options=OPTIONS,
        folder=tmp_path,
    )
    losses = defaultdict(list)
    for step in events(tmp_path / "run", "step"):
        (name,) = step["tasks"]
        losses[name].append(step["loss"])
    assert {*losses} == {*tasks}
    assert all(fmean(found[-3:]) < 0.9 * fmean(found[:3]) for found in losses.values())
    assert result.metric == "average" and result.category == "Several tasks"
    own = [result.scores[name] for name in ("minimal_pairs/ACC", "docstring_name/QA-F1")]
    assert result.score == pytest.approx(
        fmean([*own, result.scores["docstring_package/ACC"]])
    ) and result.score == result.scores["average"]  # fmt: skip
    assert result.rows == {"train": 144, "validation": 18, "test": 18}
    again = api.evaluate(tmp_path / "delta", options=OPTIONS)
    assert again["scores"] == result.scores and again["task"] == " + ".join(tasks)
    alone = api.evaluate(tmp_path / "delta", task="docstring_name", options=OPTIONS)
    assert alone["scores"]["QA-F1"] == result.scores["docstring_name/QA-F1"]


def test_names_of_several_tasks() -> None:
    with pytest.raises(ConfigurationError, match="each once"):
        api.train("t5-nano", "minimal_pairs + minimal_pairs", "lora")
    with pytest.raises(UnknownNameError, match="Did you mean 'minimal_pairs'"):
        api.train("t5-nano", "docstring_name + minimal_pair", "lora")


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        ("mpt(length=4)", None),
        ("moelora(rank=4, experts=2, embedding=6)", ("A", "B", "G")),
    ],
)
def test_a_delta_for_each_task_that_shares_leaves(
    method: str, shared: tuple[str, ...] | None, tmp_path: Path
) -> None:
    tasks = ("minimal_pairs", "docstring_name")
    result = api.train(
        "t5-nano",
        tasks,
        method,
        budget="12 steps",
        settings=quick(checkpoint_every=4, evaluation_every=6),
        options={**OPTIONS, "sharing": "method", "mixed": True},
        folder=tmp_path,
    )
    plan = api.plan("t5-nano", method)
    assert 0 < plan.shared < plan.trainable
    assert result.trainable == plan.shared + 2 * (plan.trainable - plan.shared)
    assert result.stored == 2 * plan.stored and result.artefact == str(tmp_path / "deltas")
    kept = {}
    for task in tasks:
        found = api.evaluate(tmp_path / "deltas" / task, options=OPTIONS)
        assert found["task"] == task
        assert found["scores"] == {
            name.partition("/")[2]: score
            for name, score in result.scores.items()
            if name.startswith(f"{task}/")
        }
        kept[task] = load_file(tmp_path / "deltas" / task / "delta.safetensors")
    first, second = (kept[task] for task in tasks)
    equal = {name for name in first if torch.equal(first[name], second[name])}
    named = {name for name in first if name.rpartition("/")[2] in (shared or ())}
    assert equal == named


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "model"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=8192,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return str(folder)


@pytest.mark.parametrize("mixed", [True, False])
def test_an_encoder_has_a_head_for_each_task(encoder: str, mixed: bool, tmp_path: Path) -> None:
    """One LoRA for both, heads of 2 and of 5 labels; each artefact stands alone."""
    tasks = ("minimal_pairs", "docstring_package")
    result = api.train(
        encoder,
        tasks,
        "lora(rank=2)",
        budget="10 steps",
        settings=quick(),
        options={**OPTIONS, "mixed": mixed},
        folder=tmp_path,
    )
    kept = [load_file(tmp_path / "deltas" / task / "delta.safetensors") for task in tasks]
    for name in kept[0]:
        assert torch.equal(kept[0][name], kept[1][name]) == name.startswith("lora/"), name
    moved = [one for name, one in kept[0].items() if name.endswith("/B")]
    assert any(value.any() for value in moved)
    for task in tasks:
        found = api.evaluate(tmp_path / "deltas" / task, options=OPTIONS)
        assert found["scores"]["ACC"] == result.scores[f"{task}/ACC"]
    heads = 2 * 5 * (16 + 1)
    assert result.trainable == heads + sum(
        value.numel() for name, value in kept[0].items() if name.startswith("lora/")
    )


@pytest.mark.parametrize(
    ("tasks", "method", "error", "said"),
    [
        ("minimal_pairs + docstring_package", "full", UnsupportedError, "with one head"),
        ("minimal_pairs + glue_stsb", "lora", ConfigurationError, "one loss for all rows"),
        ("minimal_pairs + docstring_name", "lora", ConfigurationError, "asks for text"),
        ("minimal_pairs + docstring_match", "adalora", UnsupportedError, "of one slot"),
    ],
)
def test_what_an_encoder_cannot_learn_together(
    encoder: str, tasks: str, method: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    (tmp_path / "glue_stsb").mkdir()
    for split in ("train", "validation", "test"):
        row = {"sentence1": f"a {split}", "sentence2": "b", "label": 3.0}
        (tmp_path / "glue_stsb" / f"{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(error, match=said):
        api.train(encoder, tasks, method, budget="1 step", options=OPTIONS, data=tmp_path)


def test_cells_of_several_tasks_run_beside_others() -> None:
    options = {"train_rows": 16, "validation_rows": 4, "test_rows": 4}
    cells = [
        Cell(
            backbone="t5-nano",
            task=task,
            method="lora(rank=2)",
            budget="2 steps",
            settings=quick(),
            options=options,
        )
        for task in ("minimal_pairs", "minimal_pairs + docstring_name", "docstring_name")
    ]
    found = api.train_many(cells)
    assert all(isinstance(one, CellResult) for one in found)
    assert [one.metric for one in found if isinstance(one, CellResult)] == [
        "ACC",
        "average",
        "QA-F1",
    ]
