"""A cell, carried out."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from deltatune import api
from deltatune.backbones.ladder import TOKENIZER
from deltatune.core import artefact
from deltatune.core.errors import (
    BackboneMismatchError,
    ConfigurationError,
    DataError,
    TrainingError,
    UnknownNameError,
)
from deltatune.execution.prepared import Prepared
from deltatune.study.cell import Cell, CellResult
from deltatune.study.comparison import Comparison
from deltatune.study.select import Grid
from deltatune.training import memory
from deltatune.training.settings import Settings
from deltatune.training.trunk_cache import TrunkCache

FEW = {"train_rows": 40, "validation_rows": 8, "test_rows": 8}


def cell(method: str, rate: float, seed: int = 0) -> Cell:
    return Cell(
        backbone="t5-nano",
        task="minimal_pairs",
        method=method,
        seed=seed,
        budget="4 steps",
        settings=Settings(learning_rate=rate, evaluation_every=2, per_device_batch_size=4),
        options=FEW,
    )


def test_the_seed_orders_the_rows_too() -> None:
    """Full tuning draws nothing: what differs between seeds is the order of the rows."""
    losses = [
        api.train(
            "t5-nano",
            "minimal_pairs",
            "full",
            budget="1 step",
            seed=seed,
            options={"train_rows": 40, "validation_rows": 4, "test_rows": 4},
        )
        .curve[-1]
        .loss
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_stages_have_a_budget_and_a_rate_each_and_go_on_from_where_they_are(
    tmp_path: Path,
) -> None:
    method = "prompt(length=2) >> bitfit"
    plain = Settings(evaluation_every=2, per_device_batch_size=4, checkpoint_every=2)
    staged = cell(method, 1e-3).model_copy(update={"settings": plain})
    (found,) = api.train_many([staged], folder=tmp_path)
    assert isinstance(found, CellResult) and found.steps == 8
    folder = tmp_path / staged.id
    rates = []
    for run in ("run-1", "run-2"):
        lines = map(json.loads, (folder / run / "log.jsonl").read_text().splitlines())
        steps = [line for line in lines if line["event"] == "step"]
        assert len(steps) == 4
        rates.append(steps[0]["learning_rate"])
    assert rates[0] > rates[1] > 0
    assert api.evaluate(folder / "delta", options=FEW)["scores"] == found.scores
    shutil.rmtree(folder / "run-2")  # as if it had been cut off between the stages
    (again,) = api.train_many([staged], folder=tmp_path)
    assert isinstance(again, CellResult) and again.scores == found.scores


def test_each_stage_has_a_budget_and_settings_of_its_own(tmp_path: Path) -> None:
    plain = Settings(per_device_batch_size=4, learning_rate=1e-3)
    staged = Cell(
        backbone="t5-nano", method="prompt(length=2) >> bitfit", task="minimal_pairs",
        budget="3 steps >> 24 tokens", options=FEW,
        settings=plain, stages=({"learning_rate": 0.3}, {"optimiser": "sgd"}),
    )  # fmt: skip
    (found,) = api.train_many([staged], folder=tmp_path)
    assert isinstance(found, CellResult)
    logs = [tmp_path / staged.id / run / "log.jsonl" for run in ("run-1", "run-2")]
    runs = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    steps = [[line for line in run if line["event"] == "step"] for run in runs]
    assert len(steps[0]) == 3 and len(steps[1]) > 0 and found.steps == 3 + len(steps[1])
    assert [run[0]["learning_rate"] for run in steps] == [0.3, 1e-3]
    facts = artefact.read(tmp_path / staged.id / "delta").facts
    assert facts["budget"] == "3 steps >> 24 tokens" and facts["stages"] == [*staged.stages]
    same = Cell(**{**staged.model_dump(), "stages": ({}, {})})
    assert staged.id != same.id and staged.settings_of(1).optimiser == "sgd"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"budget": "2 steps >> 2 steps >> 2 steps"}, "has 2 stages, and there are budgets for 3"),
        ({"stages": ({},)}, "there are settings for 1"),
        ({"method": "lora", "budget": "2 steps >> 2 steps"}, "has 1 stage, .* budgets for 2"),
        ({"stages": ({"rate": 1.0}, {})}, "training setting"),
        ({"stages": ({"seed": 1}, {})}, "seed of the cell"),
        ({"budget": "2 steps >>"}, "a number and a unit"),
    ],
)
def test_stages_that_the_method_does_not_have_are_refused(
    wrong: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        api.train("t5-nano", "minimal_pairs", **{"method": "prompt >> lora", **wrong})


def test_many_cells_end_as_each_would_alone(tmp_path: Path) -> None:
    cells = [cell("lora(rank=2)", 1e-3), cell("lora(rank=2)", 3e-3, 1), cell("lora(rank=2)", 1e-2)]
    cells += [cell("bitfit", 1e-3), cell("full", 1e-4), cell("lora(rank=2)", 1e38, 2)]
    found = api.train_many(cells, slots=2, folder=tmp_path)
    assert isinstance(found[5], TrainingError)
    for one, result in zip(cells[:5], found[:5], strict=True):
        assert isinstance(result, CellResult)
        expected = api.train(
            one.backbone, one.task, one.method,
            budget=one.budget, settings=one.settings, seed=one.seed, options=FEW,
        )  # fmt: skip
        assert result.scores == expected.scores and result.trainable == expected.trainable
        losses = [
            (mine.loss, theirs.loss)
            for mine, theirs in zip(result.curve, expected.curve, strict=True)
        ]
        assert all(abs(mine - theirs) < 1e-4 for mine, theirs in losses if mine and theirs)
        assert api.evaluate(tmp_path / one.id / "delta", options=FEW)["scores"] == result.scores
    assert [one.memory is None for one in found[:5] if isinstance(one, CellResult)] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_more_runs_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000_000)
    with pytest.raises(ConfigurationError, match="At most 1"):
        api.train_many([cell("lora(rank=64)", 1e-3, seed) for seed in range(99)], slots=99)


def test_no_run_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least one slot"):
        api.train_many([cell("lora(rank=2)", 1e-3, seed) for seed in (0, 1)], slots=0)
    wanted = Comparison(backbones=("t5-nano",), tasks=("minimal_pairs",), methods=("lora",))
    with pytest.raises(ConfigurationError, match="from 1 on; found 0"):
        api.compare(wanted, tmp_path / "none", together=0)
    assert not (tmp_path / "none").exists()


def test_cells_share_a_trunk_cache() -> None:
    cache = TrunkCache()
    method = "lora(rank=2, at='decoder.block[-1].attention.q')"
    cells = [cell(method, rate).model_copy(update={"budget": "20 steps"}) for rate in (1e-3, 3e-3)]
    plain = api.train_many([*cells, cell("full", 1e-4)])
    cached = api.train_many([*cells, cell("full", 1e-4)], trunk_cache=cache)
    assert cache.served > cache.computed > 0
    for one, other in zip(plain, cached, strict=True):
        assert isinstance(one, CellResult) and isinstance(other, CellResult)
        assert one.scores == other.scores


def test_a_cell_that_cannot_begin_leaves_the_others_alone() -> None:
    wrong = cell("lora(rank=2, at='nowhere')", 1e-3)
    missing = cell("lora(rank=2)", 1e-3).model_copy(update={"task": "glue_cola"})
    found = api.train_many(
        [wrong, cell("lora(rank=2)", 1e-3), missing, cell("lora(rank=2)", 3e-3)], data="/nowhere"
    )
    assert [type(one).__name__ for one in found] == [
        "TargetError", "CellResult", "DataError", "CellResult",
    ]  # fmt: skip


def test_a_comparison_may_train_several_cells_at_once(tmp_path: Path) -> None:
    wanted = Comparison(
        backbones=("t5-nano",),
        tasks=("minimal_pairs",),
        methods=("lora(rank=2)", "full"),
        seeds=2,
        budget="2 steps",
        settings=Settings(per_device_batch_size=4),
        grid=Grid(values=(0.5, 1.0)),
        options=FEW,
    )
    together = api.compare(wanted, tmp_path / "together", together=4)
    alone = api.compare(wanted, tmp_path / "alone")
    assert not together.failures
    assert [cell.id for cell, _ in together.final] == [cell.id for cell, _ in alone.final]
    scores = [[result and result.scores for _, result in one.final] for one in (together, alone)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("every", [None, 3])
def test_a_group_that_was_cut_off_ends_in_the_same_bits(
    every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among its own, since the order of sums shows: the cut falls when some have ended."""
    wanted = Comparison(
        backbones=("t5-nano",),
        tasks=("minimal_pairs",),
        methods=("lora(rank=2)",),
        seeds=5,
        budget="4 steps",
        settings=Settings(per_device_batch_size=4, evaluation_every=1, checkpoint_every=every),
        grid=Grid(values=(1.0,)),
        options=FEW,
    )
    whole, finish = api.compare(wanted, tmp_path / "whole", together=3), Prepared.finish
    for cut in (2, 4):
        ended = itertools.count(1)

        def interrupted(
            self: Prepared, *words: Any, cut: int = cut, ended: Any = ended, **named: Any
        ) -> CellResult:
            if next(ended) == cut:
                raise KeyboardInterrupt
            return finish(self, *words, **named)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Prepared, "finish", interrupted)
            api.compare(wanted, tmp_path / f"cut-{cut}", together=3)
        again = api.compare(wanted, tmp_path / f"cut-{cut}", together=3)
        for (one, before), (other, after) in zip(whole.final, again.final, strict=True):
            assert one.id == other.id and before is not None and after is not None
            assert before.scores == after.scores
            curves = [[(p.loss, p.validation) for p in r.curve] for r in (before, after)]
            assert curves[0] == curves[1]
            tensors = [
                load_file(tmp_path / name / "cells" / one.id / "delta" / "delta.safetensors")
                for name in ("whole", f"cut-{cut}")
            ]
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def similar_sentences(folder: Path) -> None:
    """Rows of glue_stsb, whose labels are 6.5 in the mean."""
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": 3.0 + n} for n in range(8)]
    for split, offset in (("train", 0), ("validation", 100), ("test", 200)):
        lines = [json.dumps({**row, "sentence2": f"{row['sentence2']} {offset}"}) for row in rows]
        (folder / "glue_stsb").mkdir(exist_ok=True)
        (folder / "glue_stsb" / f"{split}.jsonl").write_text("\n".join(lines))


def encoder(folder: Path) -> str:
    """A small BERT, written to a folder; its name."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=8192,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return str(folder)


@pytest.mark.parametrize(("method", "name"), [("lora", "head/"), ("full", "classifier.bias")])
def test_a_regression_begins_at_the_mean_label(tmp_path: Path, method: str, name: str) -> None:
    similar_sentences(tmp_path)
    result = api.train(
        encoder(tmp_path / "model"),
        "glue_stsb",
        method,
        budget="1 step",
        settings=Settings(learning_rate=1e-9),
        data=tmp_path,
        folder=tmp_path / "run",
    )
    assert result.artefact is not None
    kept = load_file(Path(result.artefact) / "delta.safetensors")
    (bias,) = [kept[key] for key in kept if name in key and key.endswith("bias")]
    assert bias.tolist() == pytest.approx([6.5])


def test_a_score_on_texts_of_the_pretraining_says_so(tmp_path: Path) -> None:
    similar_sentences(tmp_path)
    name, notes = encoder(tmp_path / "model"), []
    for corpora in ("[]", '[{"name": "AllNLI.jsonl.gz"}, {"name": "flickr30k_captions.jsonl.gz"}]'):
        (tmp_path / "model" / "data_config.json").write_text(corpora)
        notes.append(api.train(name, "glue_stsb", "lora", budget="1 step", data=tmp_path).notes)
    said = f"glue_stsb: {name} was trained on its texts, or some of them (flickr30k_captions)."
    assert {*notes[1]} - {*notes[0]} == {said}


def test_a_run_on_a_few_rows_of_each_label() -> None:
    options = {"shots": 4, "shots_seed": 13, "test_rows": 8}
    result = api.train("t5-nano", "minimal_pairs", "lora(rank=2)", budget="1 step", options=options)
    assert any("4 shots of each of 2 groups, drawn with seed 13" in note for note in result.notes)
    with pytest.raises(ConfigurationError, match="Take fewer"):
        api.train("t5-nano", "minimal_pairs", "lora", options={"shots": 10**5})


def test_a_run_on_a_backbone_in_bf16(tmp_path: Path) -> None:
    result = api.train(
        "t5-nano", "minimal_pairs", "lora(rank=2)", budget="2 steps",
        options={**FEW, "dtype": "bfloat16"}, folder=tmp_path,
    )  # fmt: skip
    assert api.evaluate(tmp_path / "delta", options=FEW)["scores"] == result.scores
    with pytest.raises(UnknownNameError, match="'bfloat16'"):
        api.train("t5-nano", "minimal_pairs", "lora", options={**FEW, "dtype": "bfloat"})


def test_a_run_on_a_quantised_base_is_scored_on_one(tmp_path: Path) -> None:
    """The format is an option of the run, and stands in its artefact."""
    result = api.train(
        "t5-nano", "minimal_pairs", "lora(rank=2)", budget="1 step",
        options={**FEW, "quantise": "int8"}, folder=tmp_path,
    )  # fmt: skip
    assert result.base == api.plan("t5-nano", "lora").base
    found = api.evaluate(tmp_path / "delta", options=FEW)
    assert found["scores"] == result.scores
    with pytest.raises(BackboneMismatchError, match="kept as plain numbers, not as int8"):
        api.evaluate(tmp_path / "delta", options={**FEW, "quantise": None})
    with pytest.raises(UnknownNameError, match="int8"):
        api.evaluate(tmp_path / "delta", options={**FEW, "quantise": 8})


def test_a_budget_of_nothing_scores_what_is_there() -> None:
    untrained = Cell(
        backbone="t5-nano", task="minimal_pairs", method="full", budget="nothing", options=FEW
    )
    (found,) = api.train_many([untrained])
    assert isinstance(found, CellResult)
    assert found.steps == 0
    assert [point.step for point in found.curve] == [0]
    identity = Cell(**{**untrained.model_dump(), "method": "lora(rank=2)"})
    together = Cell(**{**identity.model_dump(), "seed": 1})
    for other in api.train_many([identity, together], slots=2):
        assert isinstance(other, CellResult)
        assert other.scores == found.scores, "a fresh delta changes nothing"


def test_a_cell_is_measured_by_what_it_is_asked(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "Nobody had seen the harbour from so high a place."}\n' * 3)
    options = {
        **FEW,
        "score_training": 8,
        "transfer_to": "minimal_pairs + docstring_package",
        "general_text": str(corpus),
        "profile_rows": 2,
        "profile_tokens": 12,
    }
    asked = Cell(**{**cell("lora(rank=2)", 1e-3).model_dump(), "options": options})
    (found,) = api.train_many([asked], folder=tmp_path)
    assert isinstance(found, CellResult)
    measured = found.measured
    assert 0 <= measured["training"] <= 1
    assert measured["on minimal_pairs"] == found.score
    assert 0 <= measured["on docstring_package"] <= 1
    assert measured["text"] != measured["text, delta off"] > 0
    assert measured["profile gradients"] == 4 * found.trainable
    kept = api.evaluate(tmp_path / asked.id / "delta", options=FEW)["scores"]
    assert kept == found.scores, "what is measured leaves the delta that was kept alone"
    plain = Cell(**{**asked.model_dump(), "options": FEW})
    (same,) = api.train_many([plain])
    assert isinstance(same, CellResult)
    assert same.scores == found.scores and same.measured == {}


def test_a_text_that_was_changed_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "Once there was a mill."}\n')
    options = {**FEW, "general_text": str(corpus), "general_digest": "0" * 16}
    asked = Cell(**{**cell("bitfit", 1e-3).model_dump(), "options": options, "budget": "nothing"})
    (found,) = api.train_many([asked])
    assert isinstance(found, DataError) and "another file" in str(found)


def test_a_cloze_is_ranked() -> None:
    options = {**FEW, "template": "manual"}
    wrong = Cell(
        backbone="t5-nano", task="glue_rte", method="full", budget="nothing", options=options
    )
    (found,) = api.train_many([wrong])
    assert isinstance(found, ConfigurationError) and "mode='rank'" in str(found)
