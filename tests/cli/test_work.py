"""`train`, `eval` and `compare` as thin calls: what they hand to the package, and what they print.

The package's verbs are replaced here; that they train is tested where they live.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.study.fake import execute
from tests.study.test_store import make_cell

from deltatune import api
from deltatune.cli.compare import comparison_of
from deltatune.core.errors import ConfigurationError, TrainingError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.comparison import Comparison, run_comparison
from deltatune.study.runner import Watch
from deltatune.study.store import JournalStore
from deltatune.study.summary import Summary, summarise
from deltatune.training.trunk_cache import TrunkCache

Call = Callable[..., tuple[int, str, str]]
TRAIN = ("train", "--backbone", "t5-mini", "--task", "glue_sst2", "--method", "lora(rank=4)")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `api.train` and `api.evaluate` were asked."""
    calls: list[dict[str, Any]] = []

    def train(**request: Any) -> CellResult:
        calls.append(request)
        return execute(make_cell()).model_copy(update={"artefact": "runs/x", "notes": ("A note.",)})

    def evaluate(folder: Path, **request: Any) -> dict[str, Any]:
        calls.append({"folder": folder, **request})
        found = {"task": "emotion", "split": "test", "rows": 7, "scores": {"ACC": 0.5}}
        return {**found, "status": "proxy", "notes": ["A note."]}

    monkeypatch.setattr(api, "train", train, raising=False)
    monkeypatch.setattr(api, "evaluate", evaluate, raising=False)
    return calls


def test_train_hands_over_what_was_asked(call: Call, asked: list[dict[str, Any]]) -> None:
    words = ("--steps", "20", "--learning-rate", "1e-3", "--batch-size", "8", "--seed", "3")
    more = ("--train-rows", "100", "--out", "runs/x", "--set", "settings.warmup_steps=5")
    code, out, err = call(*TRAIN, *words, *more)
    assert code == 0, err
    (request,) = asked
    settings = request.pop("settings")
    assert (settings.learning_rate, settings.warmup_steps, settings.rows_per_step) == (1e-3, 5, 8)
    del request["progress"]
    assert request == {
        "backbone": "t5-mini",
        "task": "glue_sst2",
        "method": "lora(rank=4)",
        "budget": "20 steps",
        "seed": 3,
        "options": {"train_rows": 100},
        "folder": Path("runs/x"),
        "trunk_cache": None,
    }
    assert "trained     43,700 of 11,500,000 (0.38%)" in out
    assert "commonest label alone 50.00" in out and "saved       runs/x" in out


def test_a_preset_is_a_method_of_every_command(
    call: Call, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("backbone: t5-nano\ntask: minimal_pairs\nmethod: mam\n", encoding="utf-8")
    code, _, err = call("train", "--config", str(file), "--steps", "1")
    assert code == 0 and asked[0]["method"] == "mam", err
    code, out, err = call("plan", "--backbone", "t5-nano", "--method", "mam")
    assert code == 0 and "prefix(length=30) + parallel(bottleneck=512)" in out, err
    words = ("--backbone", "t5-nano", "--tasks", "minimal_pairs", "--methods", "mam,lora")
    code, out, err = call("compare", *words, "--out", str(tmp_path / "c"), "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["methods"] == ["prefix(length=30) + parallel(bottleneck=512)", "lora"]


def test_train_prints_json_for_machines(call: Call, asked: list[dict[str, Any]]) -> None:
    code, out, _ = call(*TRAIN, "--json")
    assert code == 0 and json.loads(out)["metric"] == "ACC"


def test_a_dry_run_trains_nothing(call: Call, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    from transformers import BertConfig

    config = tmp_path / "config.json"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    small = BertConfig(**sizes, num_hidden_layers=1, vocab_size=9, architectures=["BertModel"])
    config.write_text(small.to_json_string(use_diff=False))
    words = ("train", "--backbone", str(config), "--task", "trec", "--method", "lora", "--dry-run")
    code, out, err = call(*words)
    assert code == 0, err
    assert "trainable 256" in out and "budget    300 steps" in out
    _, out, _ = call(*words, "--json")
    assert json.loads(out)["plan"]["trainable"] == 256
    assert json.loads(out)["request"]["task"] == "trec"
    assert asked == []


def test_an_error_of_training_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(**request: Any) -> CellResult:
        raise TrainingError("The loss is not finite at step 3.")

    monkeypatch.setattr(api, "train", train, raising=False)
    assert call(*TRAIN) == (2, "", "deltatune: The loss is not finite at step 3.\n")


def test_an_interrupt_says_that_the_work_is_not_lost(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(**request: Any) -> CellResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", train, raising=False)
    code, _, err = call(*TRAIN)
    assert code == 130 and "goes on from here" in err


def test_eval_hands_over_what_was_asked(call: Call, asked: list[dict[str, Any]]) -> None:
    code, out, err = call("eval", "runs/x", "--split", "validation", "--rows", "50")
    assert code == 0, err
    assert asked == [
        {"folder": Path("runs/x"), "split": "validation", "options": {"validation_rows": 50}}
    ]
    assert out.splitlines() == ["emotion, test, 7 rows: ACC 50.00 (proxy)", "note  A note."]
    assert json.loads(call("eval", "runs/x", "--json")[1])["scores"] == {"ACC": 0.5}


COMPARE = ("compare", "--backbone", "t5-mini", "--tasks", "glue_sst2,emotion")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """`api.compare` without models; the cells it ran."""
    ran: list[Cell] = []

    def counted(cell: Cell) -> CellResult:
        ran.append(cell)
        return execute(cell)

    def compare(
        comparison: Comparison,
        folder: Path,
        *,
        data: str | None = None,
        together: int = 1,
        trunk_cache: TrunkCache | None = None,
        on: str | None = None,
        retry: bool = False,
        watch: Watch | None = None,
    ) -> Summary:
        shared = "together" in str(folder)
        assert (together, on) == ((8, "ray:there") if shared else (1, None))
        assert (trunk_cache and trunk_cache.capacity) == (1 << 29 if shared else None)
        store = JournalStore(folder)
        run_comparison(comparison, counted, store, retry=retry, watch=watch)
        return summarise(store)

    monkeypatch.setattr(api, "compare", compare, raising=False)
    return ran


def test_compare_runs_reports_and_resumes(call: Call, verb: list[Cell], tmp_path: Path) -> None:
    words = ("--methods", "full, lora(rank=4, alpha=8.0),bitfit", "--steps", "20", "--seeds", "2")
    request = (*COMPARE, *words, "--learning-rates", "3e-4,1e-3,3e-3", "--out", str(tmp_path / "c"))
    code, out, err = call(*request)
    assert code == 0, err
    assert "Ratio of tunable parameters" in out and "lora(rank=4, alpha=8.0)" in out
    assert len(verb) == len(err.splitlines()) == 3 * 2 * (3 + 1)
    assert "[18/18] t5-mini, bitfit, emotion, seed 0, learning rate 0.003: Classification-F1" in err
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "lora(rank=4, alpha=8.0)" in page
    again = call(*request)
    assert again[1] == out and again[2] == ""
    assert len(verb) == 24
    (tmp_path / "c" / "report.html").unlink()
    assert call("study", "report", str(tmp_path / "c"))[1] == out
    assert (tmp_path / "c" / "report.html").read_text(encoding="utf-8") == page
    _, machine, _ = call(*request, "--json")
    assert json.loads(machine)["tables"]["t5-mini"]["ratio"]["full"] == 1.0


def test_cells_are_run_together_where_it_is_asked(
    call: Call, verb: list[Cell], tmp_path: Path
) -> None:
    words = (
        "--methods",
        "bitfit",
        "--together",
        "8",
        "--trunk-cache",
        "0.5",
        "--on",
        "ray:there",
        "--out",
        str(tmp_path / "together"),
    )
    assert call(*COMPARE, *words)[0] == 0 and len(verb) == 2


def test_a_comparison_can_stand_in_a_file(call: Call, verb: list[Cell], tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "backbone: [t5-mini, minilm]\ntasks: [emotion]\nmethods:\n  - lora(rank=4, alpha=8)\n"
        "learning_rates: [x0.5, x1]\nsteps: 7\nsettings: {warmup_steps: 2}\n"
        "options: {mode: rank}\n"
    )
    code, _, err = call("compare", "--config", str(file), "--out", str(tmp_path / "c"))
    assert code == 0, err
    assert {cell.backbone for cell in verb} == {"t5-mini", "minilm"}
    assert {cell.method for cell in verb} == {"lora(rank=4, alpha=8.0)"} and len(verb) == 4
    assert {cell.budget for cell in verb} == {"7 steps"}
    assert all(cell.settings.warmup_steps == 2 and cell.options["mode"] == "rank" for cell in verb)


def test_failed_cells_end_with_code_1(
    call: Call, verb: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--methods", "prompt", "--learning-rates", "0.5", "--out", str(tmp_path))
    code, out, err = call(*COMPARE, *words)
    assert code == 1
    assert "FAILED, TrainingError: The loss is not finite" in err and "2 cells failed" in err
    assert "--retry tries them again" in err
    assert "Failed: t5-mini, prompt, emotion" in out
    code, again, err = call(*COMPARE, *words)
    assert (code, again) == (1, out) and len(verb) == 2
    assert "emotion, seed 0, learning rate 0.5: failed before, TrainingError: The loss" in err
    assert call(*COMPARE, *words, "--retry")[0] == 1 and len(verb) == 4


def test_a_dry_run_of_a_comparison_counts(call: Call, tmp_path: Path) -> None:
    words = ("--methods", "full,lora", "--seeds", "3", "--learning-rates", "x0.3,x1,x3")
    request = (*COMPARE, *words, "--out", str(tmp_path / "c"), "--dry-run")
    code, out, _ = call(*request)
    assert code == 0
    assert "12 cells to choose learning rates, then 8 more, 300 steps each" in out
    assert "lora: 0.0003, 0.001, 0.003" in out
    assert json.loads(call(*request, "--json")[1])["cells"] == {"search": 12, "final": 8}
    assert not (tmp_path / "c").exists()


def test_lists_are_cut_at_commas_outside_parentheses() -> None:
    found = comparison_of(
        {"backbone": "a", "tasks": "b, c", "methods": "lora(rank=4, alpha=8.0) + bitfit, full"}
    )
    assert found.methods == ("lora(rank=4, alpha=8.0) + bitfit", "full")
    assert found.tasks == ("b", "c")
    with pytest.raises(ConfigurationError, match="b stands twice"):
        comparison_of({"backbone": "a", "tasks": "b,b", "methods": "full"})
