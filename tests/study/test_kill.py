"""Processes that are killed lose nothing, and what would say so can say the opposite."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.study.killing import EXECUTIONS, Plan, Worker, check

from deltatune.study.store import JournalStore

ROOT = Path(__file__).resolve().parents[2]


def test_killed_processes_lose_nothing_and_repeat_nothing() -> None:
    """Three of the rounds of `make kill`, in a process without threads: it forks."""
    command = [sys.executable, str(ROOT / "scripts" / "kill.py"), "--rounds", "3"]
    played = subprocess.run(command, capture_output=True, text=True)
    assert played.returncode == 0, played.stdout + played.stderr
    assert len(played.stdout.splitlines()) == 3


def test_the_rounds_are_of_every_kind() -> None:
    plans = [Plan.of(number) for number in range(12)]
    assert {(plan.workers, plan.together) for plan in plans} == {
        (workers, together) for workers in (2, 3, 4) for together in (1, 3, 4)
    }


def drop(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def repeat(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[0]]


def tear(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[0][:40]]


def falsify(lines: list[bytes]) -> list[bytes]:
    done = next(n for n, line in enumerate(lines) if b'"done"' in line)
    record = json.loads(lines[done])
    record["result"]["steps"] += 1
    return [*lines[:done], json.dumps(record).encode() + b"\n", *lines[done + 1 :]]


def rerun(lines: list[bytes]) -> list[bytes]:
    execution = json.loads(lines[0])
    return [*lines, json.dumps({**execution, "worker": 1}).encode() + b"\n"]


def rerun_recorded(lines: list[bytes]) -> list[bytes]:
    execution = json.loads(lines[0])
    return [*lines, json.dumps({**execution, "worker": 1, "recorded": True}).encode() + b"\n"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a round that nobody disturbed."""
    folder = tmp_path_factory.mktemp("round")
    Worker(folder, Plan(number=0, cells=5, workers=1, together=4, kills=0), 0, last=True)()
    return {name: (folder / name).read_bytes() for name in ("journal.jsonl", EXECUTIONS)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("journal.jsonl", drop, "lost"),
        ("journal.jsonl", repeat, "recorded twice"),
        ("journal.jsonl", tear, "a torn line stays"),
        ("journal.jsonl", falsify, "not the results of an uninterrupted run"),
        (EXECUTIONS, rerun, "run again without a kill"),
        (EXECUTIONS, rerun_recorded, "run after it was recorded"),
    ],
)
def test_the_check_sees_what_is_wrong(
    name: str,
    change: Callable[[list[bytes]], list[bytes]],
    message: str,
    finished: dict[str, bytes],
    tmp_path: Path,
) -> None:
    plan = Plan(number=0, cells=5, workers=1, together=4, kills=0)
    for file, content in finished.items():
        (tmp_path / file).write_bytes(content)
    assert check(plan, tmp_path, killed=()) == 5
    changed = change(finished[name].splitlines(keepends=True))
    (tmp_path / name).write_bytes(b"".join(changed))
    with pytest.raises(AssertionError, match=message):
        check(plan, tmp_path, killed=())


def test_the_check_sees_a_claim_that_is_held(finished: dict[str, bytes], tmp_path: Path) -> None:
    plan = Plan(number=0, cells=5, workers=1, together=4, kills=0)
    for file, content in finished.items():
        (tmp_path / file).write_bytes(content)
    holder = JournalStore(tmp_path)
    cell_id = next(iter(holder.recorded()))
    assert holder.claim(cell_id)
    with pytest.raises(AssertionError, match=cell_id):
        check(plan, tmp_path, killed=())
    holder.release(cell_id)
