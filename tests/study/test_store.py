"""Every store keeps the same contract; the journal survives what happens to files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.study.fake import execute

from deltatune.core.errors import DataError, StateError
from deltatune.study.cell import Cell
from deltatune.study.store import (
    Claim,
    Done,
    Failed,
    JournalStore,
    MemoryStore,
    Note,
    Store,
    open_study,
)


def make_cell(seed: int = 0) -> Cell:
    return Cell(backbone="t5-mini", method="lora", task="glue_sst2", budget="300 steps", seed=seed)


def done(seed: int = 0) -> Done:
    cell = make_cell(seed)
    return Done(id=cell.id, cell=cell, result=execute(cell))


def failed(seed: int = 0) -> Failed:
    cell = make_cell(seed)
    return Failed(id=cell.id, cell=cell, error="TrainingError", message="no")


@pytest.fixture(params=["memory", "journal"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    memory = MemoryStore()
    return {"memory": lambda: memory, "journal": lambda: JournalStore(tmp_path / "s")}[
        request.param
    ]


def test_records_come_back_in_order(open_store: Callable[[], Store]) -> None:
    store = open_store()
    assert list(store.records()) == []
    records = [done(0), failed(1), Note(name="n", value={"a": 1})]
    for record in records:
        store.append(record)
    assert list(store.records()) == records
    assert list(open_store().records()) == records


def test_the_last_word_counts(open_store: Callable[[], Store]) -> None:
    store = open_store()
    for record in (failed(0), failed(1), done(0), Note(name="n", value={"a": 1})):
        store.append(record)
    store.append(Note(name="n", value={"a": 2}))
    assert list(store.done()) == [make_cell(0).id]
    assert list(store.failed()) == [make_cell(1).id]
    assert store.note("n") == {"a": 2} and store.note("m") is None
    store.append(failed(2))
    again = failed(1)
    store.append(again)
    store.append(failed(0))
    assert list(store.recorded()) == [make_cell(seed).id for seed in (0, 2, 1)]
    assert store.recorded()[make_cell(1).id] == store.failed()[make_cell(1).id] == again
    assert store.recorded()[make_cell(0).id] == store.done()[make_cell(0).id], "it stays done"
    assert open_store().recorded() == store.recorded()


def test_a_cell_is_claimed_once(open_store: Callable[[], Store]) -> None:
    one, other = open_store(), open_store()
    here = Claim(f"{socket.gethostname()}:{os.getpid()}", when="now")
    there = Claim("there:1", "a cell", "now")
    assert one.claim("c", here)
    assert not one.claim("c", there)
    assert not other.claim("c")
    assert other.claim("d", there)
    assert one.claimed() == other.claimed() == {"c": here, "d": there}
    one.release("c")
    assert one.claimed() == {"d": there}
    assert other.claim("c")
    said = one.claimed()["c"]
    assert (said.worker, said.cell) == (here.worker, "") and said.when
    other.release("c")
    other.release("d")
    assert not one.claimed()


@pytest.mark.parametrize("content", ["", '{"worker": "a:', "a:1", "5", '{"other": 1}'])
def test_a_claim_that_is_half_written_is_one(content: str, tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    assert store.claim("c")
    (tmp_path / "claims" / "c.lock").write_text(content)
    assert store.claimed() == {"c": Claim("", "", "")}
    store.release("c")


def test_an_open_store_sees_what_others_append(tmp_path: Path) -> None:
    one, other = JournalStore(tmp_path), JournalStore(tmp_path)
    one.append(done(0))
    assert len(other.records()) == 1
    one.append(done(1))
    other.append(done(2))
    assert [r.id for r in other.records()] == [r.id for r in one.records()]
    assert len(one.records()) == 3


@settings(max_examples=30, deadline=None)  # a busy disk takes its time
@given(st.data())
def test_a_torn_last_line_is_left_out_and_mended(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    store = JournalStore(folder)
    store.append(done(0))
    store.append(done(1))
    whole = store.path.read_bytes()
    first = whole.index(b"\n") + 1
    kept = data.draw(st.integers(first, len(whole) - 1))
    os.truncate(store.path, kept)
    assert [r.id for r in JournalStore(folder).records()] == [make_cell(0).id]
    JournalStore(folder).append(done(2))
    assert list(JournalStore(folder).done()) == [make_cell(0).id, make_cell(2).id]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_records_of_one_call_are_kept_all_or_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("group")
    store = JournalStore(folder)
    store.append(done(0))
    store.append(done(1), failed(2), done(3))
    assert [r.id for r in JournalStore(folder).records()] == [make_cell(n).id for n in range(4)]
    whole = store.path.read_bytes()
    os.truncate(store.path, data.draw(st.integers(whole.index(b"\n") + 1, len(whole) - 1)))
    assert [r.id for r in JournalStore(folder).records()] == [make_cell(0).id]
    JournalStore(folder).append(done(1))
    assert list(JournalStore(folder).done()) == [make_cell(0).id, make_cell(1).id]


def test_a_long_torn_line_is_cut_off_whole(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.append(done(0))
    with open(store.path, "ab") as file:
        file.write(b"x" * 200_000)
    store.append(done(1))
    assert len(JournalStore(tmp_path).done()) == 2


def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = JournalStore(tmp_path)
    store.append(done(0))
    with open(store.path, "ab") as file:
        file.write(b'{"kind": "dune"}\n')
    store.append(done(1))
    with pytest.raises(DataError, match=r"journal\.jsonl, line 2, is not a record.*Remove"):
        JournalStore(tmp_path).records()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"Cannot make the folder of the study in .*Give a folder"):
        JournalStore(tmp_path / "file")


def test_only_a_study_that_was_begun_is_opened(tmp_path: Path) -> None:
    JournalStore(tmp_path).append(done(0))
    assert len(open_study(tmp_path).done()) == 1
    with pytest.raises(StateError, match=r"There is no study in .*none. Begin one"):
        open_study(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JournalStore(tmp_path)
    store.append(done(0))
    before = store.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device"):
        store.append(done(1))
    assert store.path.read_bytes() == before


def test_a_claim_that_cannot_be_written_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    store = JournalStore(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StateError, match="claim a cell"):
        patched.setattr("deltatune.study.store._write_all", full)
        store.claim("c")
    assert not store.claimed() and store.claim("c")
    store.release("c")


WRITER = """
import sys
from tests.study.test_store import done
from deltatune.study.store import JournalStore
store = JournalStore(sys.argv[1])
assert store.claim("cell")
record = done(int(sys.argv[2]))
print("ready", flush=True)
while True:
    store.append(record)
"""


def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for number in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            cwd=root,
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        assert not JournalStore(tmp_path).claim("cell")
        while not any(r.id == make_cell(number).id for r in JournalStore(tmp_path).records()):
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = JournalStore(tmp_path)
        assert len(store.done()) == number + 1
        assert store.claim("cell"), "the claim of a dead process is free"
        store.release("cell")
