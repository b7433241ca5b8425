"""A running study in words, and the server of its page."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.study.fake import execute
from tests.study.test_store import done, failed, make_cell

from deltatune.core.errors import StateError
from deltatune.study.serving import PageServer
from deltatune.study.store import Claim, Done, JournalStore, MemoryStore, Note, Store
from deltatune.study.watching import RECENT, snapshot

HOSTILE = "<img src=x onerror=document.title='taken'>"


@contextmanager
def filled(store: Store) -> Iterator[Store]:
    """A study whose seeds 0 to 2 have ended; within, 3 and 4 run; 5 waits."""
    ids = [make_cell(seed).id for seed in range(6)]
    store.append(Note(name="comparison", value={"searched": ids, "final": []}))
    for record in (done(0), failed(1), done(2)):
        store.append(record)
    began = datetime.now(UTC) - timedelta(seconds=90)
    store.claim(ids[3], Claim("here:1", str(make_cell(3))))
    store.claim(ids[4], Claim("there:2", str(make_cell(4)), began.isoformat()))
    yield store
    store.release(ids[3])
    store.release(ids[4])


def test_a_snapshot_says_what_runs_and_what_ended() -> None:
    with filled(MemoryStore()) as store:
        seen = snapshot(store)
    assert (seen.planned, seen.done, seen.failed, seen.running, seen.waiting) == (6, 2, 1, 2, 1)
    assert seen.processes == 2 and not seen.ended and seen.seconds_left
    assert [(work.cell, work.worker) for work in seen.at_work] == [
        (str(make_cell(4)), "there:2"),
        (str(make_cell(3)), "here:1"),
    ]
    assert seen.at_work[0].seconds == pytest.approx(90, abs=5)
    assert [one.cell for one in seen.recent] == [str(make_cell(seed)) for seed in (2, 1, 0)]
    result = execute(make_cell(2))
    assert seen.recent[0].said == f"ACC {100 * result.score:.2f}, {result.total_seconds:.1f} s"
    assert [(one.failed, one.said) for one in seen.failures] == [(True, "TrainingError: no")]


def test_a_claim_that_says_nothing_is_shown_by_its_id() -> None:
    store = MemoryStore()
    store.claim("c", Claim("", "", ""))
    (work,) = snapshot(store).at_work
    assert (work.cell, work.worker, work.seconds) == ("c", "", None)


def test_the_last_cells_are_few() -> None:
    store = MemoryStore()
    for seed in range(RECENT + 3):
        store.append(done(seed))
    assert [one.cell for one in snapshot(store).recent] == [
        str(make_cell(seed)) for seed in range(RECENT + 2, 2, -1)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JournalStore]:
    with filled(store := JournalStore(tmp_path)):
        yield store


@pytest.fixture
def server(store: JournalStore) -> Iterator[PageServer]:
    with PageServer(store) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str, *, method: str = "GET", hosts: tuple[str, ...] | None = None
) -> tuple[int, str]:
    """A request with any host, and what is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for host in (f"127.0.0.1:{server.server_port}",) if hosts is None else hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_the_page_and_its_state_are_served(server: PageServer, store: JournalStore) -> None:
    with urllib.request.urlopen(server.address) as answer:
        page, headers = answer.read().decode(), answer.headers
    assert 'fetch("state.json")' in page and "http://" not in page and "https://" not in page
    assert "innerHTML" not in page, "texts of a study are not markup"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and "Python" not in headers["Server"]
    with urllib.request.urlopen(server.address + "state.json") as answer:
        state = json.load(answer)
    expected = json.loads(json.dumps(asdict(snapshot(store))))
    times = {"at_work": [], "seconds_left": 0}
    assert {**state, **times} == {**expected, **times}
    assert [work["worker"] for work in state["at_work"]] == ["there:2", "here:1"]


def test_the_state_is_that_of_the_moment(server: PageServer, store: JournalStore) -> None:
    assert json.loads(ask(server, "/state.json")[1])["done"] == 2
    store.append(done(5))
    until = time.monotonic() + 10
    while json.loads(ask(server, "/state.json")[1])["done"] != 3:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_only_those_who_mean_this_server_are_answered(server: PageServer) -> None:
    port = server.server_port
    assert ask(server, "/", hosts=(f"localhost:{port}",))[0] == 200
    own = f"127.0.0.1:{port}"
    for hosts in ((f"evil.example:{port}",), ("127.0.0.1",), (), (own, "evil.example"), (own, own)):
        code, content = ask(server, "/state.json", hosts=hosts)
        assert (code, content) == (421, "This is another host.\n"), hosts


@pytest.mark.parametrize(
    "path",
    [
        *("/state.json/", "/index.html", "/../etc/passwd", "/%2e%2e/journal.jsonl", "/?a=1"),
        *("/journal.jsonl", "state.json", "http://127.0.0.1/"),
    ],
)
def test_nothing_else_is_there(path: str, server: PageServer) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_else_can_be_asked(method: str, server: PageServer) -> None:
    assert ask(server, "/", method=method)[0] == 501


def test_a_damaged_store_is_said(server: PageServer, store: JournalStore) -> None:
    with open(store.path, "a") as file:
        file.write("{}\n")
    code, content = ask(server, "/state.json")
    assert code == 500 and "is not a record" in json.loads(content)["error"]


def test_a_port_that_is_taken_is_said(server: PageServer, store: JournalStore) -> None:
    with pytest.raises(StateError, match="Give another port"):
        PageServer(store, server.server_port)
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_shows_texts_as_they_are(
    browser: Any, server: PageServer, store: JournalStore
) -> None:
    """What the study says appears, is updated, and runs nothing."""
    browser.get(server.address)
    _wait_for(lambda: browser.title == "Study: 3 of 6 cells")
    cell = make_cell(5).model_copy(update={"method": HOSTILE})
    store.append(Done(id=make_cell(5).id, cell=cell, result=execute(make_cell(5))))
    _wait_for(lambda: browser.title == "Study: 4 of 6 cells")
    assert HOSTILE in browser.find_element("id", "recent").text
    assert "there:2" in browser.find_element("id", "at_work").text
    assert "TrainingError: no" in browser.find_element("id", "failures").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def _wait_for(holds: object, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.1)
