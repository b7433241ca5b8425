"""`deltatune study watch`: what a terminal and a pipe are shown."""

from __future__ import annotations

import io
import re
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.study.fake import execute
from tests.study.test_store import done, failed, make_cell
from tests.study.test_watching import filled

from deltatune.cli.study.watch import picture
from deltatune.core.errors import TrainingError
from deltatune.study.cell import Cell, CellResult
from deltatune.study.runner import run
from deltatune.study.serving import PageServer
from deltatune.study.store import JournalStore, MemoryStore, Note, Store
from deltatune.study.watching import snapshot

Call = Callable[..., tuple[int, str, str]]
MODULE = sys.modules[picture.__module__]  # its package has the command under this name


def drawn(store: Store) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(picture(snapshot(store)))
    return console.export_text()


def test_a_terminal_shows_counts_work_scores_and_failures() -> None:
    with filled(MemoryStore()) as store:
        text = drawn(store)
    assert re.search(r"3 of 6: 2 done, 1 failed, 2 running, 1 waiting; 0:00:\d\d left", text)
    work, recent, failures = (text.index(f"\n{t}\n") for t in ("at work", "ended last", "failed"))
    assert work < text.index(f"{make_cell(4)}  there:2  0:01:3") < recent < failures
    assert text.index(f"{make_cell(2)}  ACC ") > recent
    assert text.index(f"{make_cell(1)}  TrainingError: no", failures) > failures


def test_a_long_list_is_cut_and_texts_are_not_markup() -> None:
    store = MemoryStore()
    for seed in range(20):
        store.append(failed(seed).model_copy(update={"message": "[bold]no[/bold]"}))
    text = drawn(store)
    assert "and 8 more" in text and "[bold]no[/bold]" in text


def test_who_waits_for_nobody_is_told() -> None:
    store = MemoryStore()
    store.append(Note(name="comparison", value={"searched": [make_cell().id], "final": []}))
    assert "1 waiting; nobody is at work" in drawn(store)


def test_a_pipe_gets_a_line_for_each_new_record(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cells = JournalStore(tmp_path), [make_cell(seed) for seed in range(4)]
    ids = [cell.id for cell in cells]
    store.append(Note(name="comparison", value={"searched": ids, "final": []}))
    store.append(done(0))
    looks = 0

    def work(seconds: float) -> None:
        """What another process does between two looks."""
        nonlocal looks
        looks += 1
        if looks == 2:
            run(cells[:2], sometimes, store)
        if looks == 3:
            store.append(Note(name="comparison", value={"searched": ids, "final": ids}))
            run(cells, sometimes, store)

    monkeypatch.setattr(MODULE.time, "sleep", work)
    code, out, err = call("study", "watch", str(tmp_path))
    assert (code, err, looks) == (0, "", 3)
    lines = out.splitlines()
    assert lines[0].startswith("1 of 4: 1 done, 0 failed, 0 running, 3 waiting")
    assert lines[1] == f"{cells[1]}: FAILED, TrainingError: no"
    assert lines[2].startswith("2 of 4: ")
    assert [line.partition(":")[0] for line in lines[3:5]] == [str(cell) for cell in cells[2:]]
    assert lines[5:] == ["4 of 4: 3 done, 1 failed, 0 running, 0 waiting"]


def sometimes(cell: Cell) -> CellResult:
    if cell.seed == 1:
        raise TrainingError("no")
    return execute(cell)


def test_a_terminal_is_shown_until_the_end(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JournalStore(tmp_path)
    store.append(Note(name="comparison", value={"searched": [], "final": [make_cell().id]}))
    monkeypatch.setenv("TERM", "xterm")
    console = Console(record=True, force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(MODULE, "console", lambda: console)
    monkeypatch.setattr(MODULE.time, "sleep", lambda seconds: store.append(done(0)))
    assert call("study", "watch", str(tmp_path))[0] == 0
    text = console.export_text()
    assert text.index("0 of 1: ") < text.index("1 of 1: 1 done")


def test_an_interrupt_ends_it_well(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE.time, "sleep", interrupt)
    with filled(JournalStore(tmp_path)):
        code, out, err = call("study", "watch", str(tmp_path))
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_a_page_is_served(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bytes] = []

    def serve(server: PageServer) -> None:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        with urllib.request.urlopen(server.address) as answer:
            served.append(answer.read())
        answering.join()

    monkeypatch.setattr(PageServer, "serve_forever", serve)
    with filled(JournalStore(tmp_path)):
        code, out, err = call("study", "watch", str(tmp_path), "--page")
    assert code == 0 and re.fullmatch(r"page: http://127\.0\.0\.1:\d+/\n", out), err
    assert served[0].startswith(b"<!doctype html>")


def test_a_port_needs_a_page(call: Call, tmp_path: Path) -> None:
    code, _, err = call("study", "watch", str(tmp_path), "--port", "8000")
    assert (code, err) == (2, "deltatune: --port is that of the page. Give --page too.\n")
    code, _, err = call("study", "watch", str(tmp_path))
    assert code == 2 and "There is no study in" in err
