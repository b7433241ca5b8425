"""`deltatune study`: what is printed of a folder."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.fake import TASKS
from tests.study.test_comparison import compare

from deltatune.study.cell import Cell, CellResult
from deltatune.study.export import export
from deltatune.study.select import Grid
from deltatune.study.store import JournalStore

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study of which all cells of prompt tuning failed."""
    path = tmp_path_factory.mktemp("study")
    grid = Grid(values=(0.5,), relative=False)
    compare(JournalStore(path), methods=("bitfit", "prompt"), grid=grid, seeds=1)
    return str(path)


def test_status_counts_and_names_what_failed(call: Call, folder: str) -> None:
    code, out, err = call("study", "status", folder)
    assert code == 0, err
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[:5] == [
        ["planned", "10"],
        ["done", "5"],
        ["failed", "5"],
        ["running", "0"],
        ["waiting", "0"],
    ]
    assert (
        "failed     t5-mini, prompt, emotion, seed 0, learning rate 0.5: TrainingError: The" in out
    )
    assert "left" not in out and "Traceback" not in out
    assert call("study", "status", folder, "--traces")[1].count("Traceback") == 5


def test_status_of_a_study_at_work(call: Call, tmp_path: Path) -> None:
    ran = 0

    def stopped(cell: Cell) -> CellResult:
        nonlocal ran
        ran += 1
        if ran > 2:
            raise KeyboardInterrupt
        return CellResult(metric="a", scores={"a": 1}, trainable=1, base=2, total_seconds=90)

    store = JournalStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(store, stopped, methods=("bitfit",), seeds=1)
    store.claim("some cell")
    _, out, _ = call("study", "status", str(tmp_path))
    assert "running    1 (1 process)" in out and "waiting    13" in out
    assert "time       90.0 s a cell" in out and "left       0:21:00 for 1 process" in out
    found = json.loads(call("study", "status", str(tmp_path), "--json")[1])
    store.release("some cell")
    assert found["planned"] == 3 * len(TASKS) + 1 == 16 and found["seconds_left"] == 14 * 90
    assert list(found["running"]) == ["some cell"]


def test_machines_get_failures_with_traces_if_asked(call: Call, folder: str) -> None:
    found = json.loads(call("study", "status", folder, "--json")[1])
    assert found["failed"] == len(found["failures"]) == 5
    assert set(found["failures"][0]) == {"id", "cell", "recorded", "error", "message"}
    found = json.loads(call("study", "status", folder, "--json", "--traces")[1])
    assert all("Traceback" in failure["trace"] for failure in found["failures"])


def test_query_prints_a_table_json_or_csv(call: Call, folder: str) -> None:
    sql = "select task, score, error from cells where task = 'emotion' order by error desc"
    code, out, err = call("study", "query", folder, sql)
    assert code == 0, err
    head, *lines = (line.split() for line in out.splitlines())
    assert head == ["task", "score", "error"]
    assert sorted(lines, key=len)[1] == ["emotion", *sorted(lines, key=len)[1][1:]]
    found = json.loads(call("study", "query", folder, sql, "--json")[1])
    assert found["columns"] == head and len(found["rows"]) == 2
    rows = list(csv.reader(io.StringIO(call("study", "query", folder, sql, "--csv")[1])))
    assert rows[0] == head and {row[2] for row in rows[1:]} == {"", "TrainingError"}


def test_texts_of_a_study_are_not_markup(call: Call, folder: str) -> None:
    out = call("study", "query", folder, "select '[bold]x[/bold]' as \"[red]\"")[1]
    assert "[red]" in out and "[bold]x[/bold]" in out


@pytest.mark.parametrize("form", ["json", "csv", "latex", "markdown"])
def test_export_prints_or_writes(call: Call, folder: str, form: str, tmp_path: Path) -> None:
    expected = export(JournalStore(folder), form).decode()
    assert call("study", "export", folder, "--format", form)[:2] == (0, expected)
    file = tmp_path / "file"
    code, out, _ = call("study", "export", folder, "--format", form, "--out", str(file))
    assert (code, out) == (0, f"written    {file}\n")
    assert file.read_text(encoding="utf-8") == expected


def test_parquet_is_a_file(call: Call, folder: str, tmp_path: Path) -> None:
    file = str(tmp_path / "cells.parquet")
    assert call("study", "export", folder, "--format", "parquet", "--out", file)[0] == 0
    code, _, err = call("study", "export", folder, "--format", "parquet")
    assert (code, err) == (2, "deltatune: Parquet is not text. Give --out FILE.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("status", "nowhere"), "There is no study in nowhere"),
        (("query", "{folder}", "select scor from cells"), "Did you mean 'score'"),
        (("query", "{folder}", "select 1", "--json", "--csv"), "not both"),
        (("export", "{folder}", "--format", "exel"), "There is no format 'exel'"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], message: str, call: Call, folder: str
) -> None:
    code, out, err = call("study", *(word.format(folder=folder) for word in words))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err


def test_looking_does_not_write(call: Call, folder: str) -> None:
    before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    call("study", "status", folder)
    call("study", "query", folder, "select 1")
    assert before == {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_an_experiment_runs_goes_on_and_is_shown(call: Call, tmp_path: Path) -> None:
    rows = ("--train-rows", "16", "--validation-rows", "4", "--test-rows", "4")
    words = ("study", "gap", "--backbone", "t5-nano", "--tasks", "minimal_pairs", "--seeds", "1")
    words += ("--methods", "bitfit,lora(rank=2)", "--steps", "2", *rows)
    code, out, _ = call(*words, "--out", str(tmp_path), "--dry-run", "--per", "task")
    assert code == 0 and "methods: 2, backbones: 1, tasks: 1" in out
    assert not list(tmp_path.iterdir())
    code, out, err = call(*words, "--out", str(tmp_path))
    assert code == 0, err
    assert "generalisation gap (Extended Data Table 3)" in out
    page = (tmp_path / "report.html").read_text()
    assert "Gap: how much better" in page and "lora(rank=2)" in page
    size = (tmp_path / "journal.jsonl").stat().st_size
    assert call(*words, "--out", str(tmp_path))[1] == out
    (tmp_path / "report.html").unlink()
    assert call("study", "report", str(tmp_path))[1] == out
    assert (tmp_path / "report.html").read_text() == page
    assert (tmp_path / "journal.jsonl").stat().st_size == size, "nothing is run twice"
    code, _, err = call(*("study", "scale", *words[2:]), "--out", str(tmp_path))
    assert code == 2 and "holds the study 'gap'" in err


def test_an_experiment_asks_for_what_it_has_no_value_for(call: Call, tmp_path: Path) -> None:
    code, _, err = call("study", "gap", "--out", str(tmp_path))
    assert code == 2 and "Give --backbone and --tasks" in err
    code, _, err = call("study", "scale", "--out", str(tmp_path))
    assert code == 2 and "Give --tasks" in err


def test_what_a_report_ends_with_is_run_again(call: Call, tmp_path: Path) -> None:
    words = ["study", "gap", "--backbone", "t5-nano", "--tasks", "minimal_pairs", "--seeds", "1"]
    words += ["--methods", "bitfit", "--steps", "1", "--train-rows", "8", "--test-rows", "4"]
    assert call(*words, "--validation-rows", "4", "--out", str(tmp_path / "first"))[0] == 0
    page = html.unescape((tmp_path / "first" / "report.html").read_text())
    file = tmp_path / "study.json"
    file.write_text(page.partition("<pre")[2].partition(">")[2].partition("</pre>")[0])
    again = ["study", "run", str(file), "--out", str(tmp_path / "again")]
    assert call(*again)[0] == 0
    done = [JournalStore(tmp_path / name).done() for name in ("first", "again")]
    assert [*done[0]] == [*done[1]]
    code, _, err = call(*again, "--set", "seeds=2")
    assert code == 2 and "Leave seeds out" in err
    code, _, err = call(*again, "--set", "experiment=gapp")
    assert code == 2 and "'gapp'" in err and "'gap'" in err
    code, _, err = call(*again, "--set", "parts={x: {}}")
    assert code == 2 and "backbones" in err


def test_a_file_describes_a_study(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "backbone: t5-nano\ntasks: [minimal_pairs]\nmethods: [bitfit]\nseeds: 1\n"
        "protocols: [clean, faithful]\nbudgets: [2 steps]\nlearning_rates: 3 of x0.5..x2\n"
        "train_rows: 16\nvalidation_rows: 4\ntest_rows: 4\n"
    )
    out_folder = tmp_path / "out"
    words = ("study", "run", str(file), "--out", str(out_folder))
    code, out, _ = call(*words, "--dry-run")
    assert code == 0 and "faithful, 2 steps" in out and "cells: 3 to choose" in out
    code, out, err = call(*words)
    assert code == 0, err
    assert "clean against faithful" in out
    assert len(JournalStore(out_folder).done()) == 6
    code, _, err = call(*words, "--set", "experiment=gap")
    assert code == 2 and "one protocol and one budget" in err
    own = ("--set", "selection=test", "--set", "by_method={bitfit: {base_dropout: true}}")
    assert call(*words, *own, "--dry-run")[0] == 0
    code, _, err = call(*words, "--set", "by_method={lora: {}}", "--dry-run")
    assert code == 2 and "method with settings of its own" in err
    file.write_text("backbon: t5-nano\n")
    code, _, err = call(*words)
    assert code == 2 and "'backbon'" in err and "'backbone'" in err
