"""Processes that push and pull on one hub and are killed: what can be seen is whole."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

from deltatune import api
from deltatune.core.artefact import read
from deltatune.hub import Hub
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

CONTEXT = multiprocessing.get_context("fork")
PROCESSES, DELTAS, ROUNDS = 4, 12, 8


def work(url: str, store: str, folders: list[str], seed: int) -> None:
    draw, hub = random.Random(seed), Hub(url, store=store)
    while True:
        number = draw.randrange(len(folders))
        name = f"team/delta-{number % 5}:v{number}"
        if draw.random() < 0.6:
            hub.push(folders[number], name)
        else:
            known = [reference for reference, _ in hub.entries()]
            if known:
                read(hub.pull(draw.choice(known)))


def test_processes_that_are_killed_leave_nothing_half_visible(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build()
    bank = api.attach(model, "lora(rank=2)", slots=DELTAS)
    move(bank)
    folders = [str(api.save(bank, tmp_path / f"made-{k}", slot=k)) for k in range(DELTAS)]
    url, store = str(tmp_path / "hub"), str(tmp_path / "store")
    draw = random.Random(0)
    for turn in range(ROUNDS):
        args = [(url, store, folders, turn * PROCESSES + k) for k in range(PROCESSES)]
        processes = [CONTEXT.Process(target=work, args=one) for one in args]
        for process in processes:
            process.start()
        time.sleep(draw.uniform(0.05, 0.3))
        for process in processes:
            assert process.is_alive(), "no process ends by itself: an error would"
            process.kill()
            process.join()
        hub = Hub(url, store=tmp_path / "other")
        for reference, entry in hub.entries():
            assert hub.verify(reference) == entry
        for place in Path(store).iterdir():
            if not place.name.startswith("."):
                assert read(place).digest == place.name
    assert len(list(hub.entries())) >= DELTAS // 2
    for k, folder in enumerate(folders):  # and what was left half-way is no hindrance
        hub.push(folder, f"team/delta-{k % 5}:v{k}")
    assert len(list(hub.entries())) == DELTAS
    hub.tidy(older=-1)
    assert not [path for path in Path(url).rglob("*") if ".part-" in path.name]
    assert all(hub.verify(reference) for reference, _ in hub.entries())
