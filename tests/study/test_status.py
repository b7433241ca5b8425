"""How far a study is: every cell is counted once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.study.test_store import done, failed, make_cell

from deltatune.study.experiment import STUDY
from deltatune.study.status import status
from deltatune.study.store import Claim, MemoryStore, Note


def test_cells_are_done_failed_running_or_waiting() -> None:
    store = MemoryStore()
    ids = [make_cell(seed).id for seed in range(7)]
    store.append(Note(name="comparison", value={"searched": ids[:5], "final": [ids[0], ids[5]]}))
    for record in (done(0), failed(1), done(2), failed(6)):
        store.append(record)
    store.claim(ids[3])
    store.claim(ids[6])  # it failed, and is tried again
    found = status(store)
    assert (found.planned, found.done, found.waiting) == (7, 2, 2)
    assert [record.id for record in found.failures] == [ids[1]]
    assert set(found.running) == {ids[3], ids[6]} and found.processes == 1
    mean = (done(0).result.total_seconds + done(2).result.total_seconds) / 2
    assert found.mean_seconds == pytest.approx(mean)
    assert found.seconds_left == pytest.approx(4 * mean)


def test_the_last_note_of_every_name_counts() -> None:
    store = MemoryStore()
    for name, ids in (("a", "xy"), ("b", "z"), ("a", "x")):
        store.append(Note(name=name, value={"searched": list(ids), "final": []}))
    store.append(Note(name="remark", value={"text": "no cells"}))
    assert (status(store).planned, status(store).waiting) == (2, 2)


@pytest.mark.parametrize(
    ("finals", "study", "ended"),
    [
        ({}, None, True),
        ({"a": []}, None, False),
        ({"a": ["x"]}, None, True),
        ({"a": ["x"], "b": []}, None, False),
        ({"a": ["x"]}, {"parts": {"a": {}, "b": {}}}, False),
        ({"a": ["x"], "b": ["x"]}, {"parts": {"a": {}, "b": {}}}, True),
    ],
)
def test_a_study_ends_when_every_part_has_planned_its_last_cells(
    finals: dict[str, list[str]], study: dict[str, object] | None, ended: bool
) -> None:
    """Between the search and the cells with all seeds nothing waits and nothing runs."""
    store, ran = MemoryStore(), done(0)
    store.append(ran)
    for name, ids in finals.items():
        value = {"searched": [], "final": [ran.id for _ in ids]}
        store.append(Note(name=name, value=value))
    if study is not None:
        store.append(Note(name=STUDY, value=study))
    assert status(store).ended is ended
    store.claim("another cell")
    assert not status(store).ended


def test_processes_share_what_is_left() -> None:
    class Busy(MemoryStore):
        def claimed(self) -> dict[str, Claim]:
            workers = {"a": "host:1", "b": "host:1", "c": "host:2", "d": ""}
            return {key: Claim(worker) for key, worker in workers.items()}

    store = Busy()
    store.append(done(0))
    found = status(store)
    assert found.processes == 2
    assert found.seconds_left == pytest.approx(4 * done(0).result.total_seconds / 2)


def test_nothing_is_known_of_an_empty_study() -> None:
    found = status(MemoryStore())
    assert (found.planned, found.mean_seconds, found.seconds_left) == (0, None, None)


@given(st.lists(st.sampled_from(["done", "failed", "claim", "plan"]), max_size=12), st.data())
def test_every_cell_is_counted_once(steps: Sequence[str], data: st.DataObject) -> None:
    store, known = MemoryStore(), set[str]()
    for step in steps:
        seed = data.draw(st.integers(0, 3))
        cell_id = make_cell(seed).id
        known.add(cell_id)
        if step == "done":
            store.append(done(seed))
        elif step == "failed":
            store.append(failed(seed))
        elif step == "claim":
            store.claim(cell_id)
        else:
            store.append(Note(name=cell_id, value={"searched": [cell_id], "final": []}))
    assert status(store).planned == len(known)
