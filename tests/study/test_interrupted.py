"""A study of real models whose processes are killed ends in the report of one that none was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from deltatune.study.cell import CellResult
from deltatune.study.findings import findings
from deltatune.study.report import render
from deltatune.study.store import Done, JournalStore, MemoryStore, open_study

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    *("convergence", "--backbone", "t5-nano", "--tasks", "minimal_pairs"),
    *("--methods", "bitfit,lora(rank=2)", "--seeds", "5", "--learning-rates", "x1,x3"),
    *("--steps", "6", "--train-rows", "24", "--validation-rows", "8", "--test-rows", "8"),
    *("--set", "settings.evaluation_every=2", "--set", "settings.checkpoint_every=2"),
    *("--set", "settings.per_device_batch_size=4", "--together", "3"),
)


def begin(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deltatune", "study", *WORDS, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def run_to_end(folder: Path, count: int) -> None:
    codes = [process.wait(300) for process in [begin(folder) for _ in range(count)]]
    assert codes == [0] * count, (folder / "log").read_text()


def bytes_of(folder: Path, names: str) -> int:
    """Of what a study has written under such names."""
    found = 0
    for path in folder.glob(names):
        with suppress(FileNotFoundError):  # it is just being replaced
            found += path.stat().st_size
    return found


def kill_at_growth(folder: Path, names: str, process: subprocess.Popen[bytes]) -> None:
    """Kills a process when a file that it writes has just grown."""
    size, until = bytes_of(folder, names), time.monotonic() + 120
    while bytes_of(folder, names) <= size and process.poll() is None:
        assert time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.002)
    process.kill()
    process.wait()


def without_times(result: CellResult) -> CellResult:
    """A result without what a clock, the memory and the folder decide."""
    curve = tuple(point.model_copy(update={"seconds": point.step}) for point in result.curve)
    fixed = {"seconds": 1.0, "total_seconds": 1.0, "memory": None, "artefact": None}
    return result.model_copy(update={**fixed, "curve": curve})


def report(folder: Path) -> str:
    """The page of a study, times and memory apart."""
    kept, shown = open_study(folder), MemoryStore()
    for record in kept.records():
        if isinstance(record, Done):
            record = record.model_copy(update={"result": without_times(record.result)})
        shown.append(record)
    found = findings(shown)
    assert not found.failures
    return render(found.title, found.subtitle, found.facts, found.sections)


def test_a_study_that_is_killed_ends_in_the_same_report(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_to_end(whole, 1)
    kill_at_growth(killed, "cells/*/delta/delta.safetensors", begin(killed))
    kill_at_growth(killed, "journal.jsonl", begin(killed))
    left = len(open_study(killed).done())
    run_to_end(killed, 2)
    assert 0 < left < len(JournalStore(killed).done()) == 2 * (2 + 4)
    assert report(killed) == report(whole)
