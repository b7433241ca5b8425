"""Rounds in which processes push and pull on one hub, and are killed."""

from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import dataclass
from pathlib import Path

from deltatune import api
from deltatune.core.artefact import read
from deltatune.hub import Hub
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

__all__ = ["Tally", "play"]

CONTEXT = multiprocessing.get_context("fork")
NAMES = 20  # fewer than deltas, so that several lie under one name


@dataclass(frozen=True)
class Tally:
    """What was done.

    Attributes:
        kills: processes that were killed at their work.
        verified: deltas that were fetched from the hub and held to their digests.
        stored: deltas that lay in the store of pulled ones after a round, read again.
        left: files that killed processes left and `tidy` took in the end.
    """

    kills: int
    verified: int
    stored: int
    left: int


def play(
    place: Path, *, processes: int, deltas: int, rounds: int, seed: int = 0, kind: str = ""
) -> Tally:
    """Plays all rounds on one hub; after each, every visible delta must be whole.

    Args:
        place: where everything is kept.
        processes, deltas, rounds, seed: of the play.
        kind: how the URL of the hub begins: "oci:" for an image layout, nothing for a folder.
    """
    bank = api.attach(FAMILIES["bert"].build(), "lora(rank=2)", slots=deltas)
    move(bank)
    folders = [str(api.save(bank, place / f"made-{k}", slot=k)) for k in range(deltas)]
    url, store, draw = f"{kind}{place / 'hub'}", place / "store", random.Random(seed)
    verified = stored = 0
    for turn in range(rounds):
        _killed(url, store, folders, processes, draw, first=turn * processes)
        hub = Hub(url, store=place / "other")
        for reference, entry in hub.entries():
            assert hub.verify(reference) == entry
            verified += 1
        for one in store.iterdir() if store.exists() else ():
            if not one.name.startswith("."):
                assert read(one).digest == one.name
                stored += 1
    for k, folder in enumerate(folders):  # what was left half-way is no hindrance
        hub.push(folder, _name(k))
    assert len(list(hub.entries())) == deltas
    left = hub.tidy(older=-1)
    assert not [path for path in Path(url).rglob("*") if ".part-" in path.name]
    assert all(hub.verify(reference) for reference, _ in hub.entries())
    return Tally(rounds * processes, verified, stored, left)


def _killed(
    url: str, store: Path, folders: list[str], processes: int, draw: random.Random, first: int
) -> None:
    """One round: all are started, and killed one after the other."""
    started = [
        CONTEXT.Process(target=_work, args=(url, str(store), folders, first + k))
        for k in range(processes)
    ]
    for process in started:
        process.start()
    time.sleep(draw.uniform(0.05, 0.3))
    for process in started:
        time.sleep(draw.uniform(0.0, 0.02))
        assert process.is_alive(), "no process ends by itself: an error would"
        process.kill()
        process.join()


def _work(url: str, store: str, folders: list[str], seed: int) -> None:
    """Pushes and pulls what it draws, until it is killed."""
    draw, hub = random.Random(seed), Hub(url, store=store)
    while True:
        if draw.random() < 0.6:
            number = draw.randrange(len(folders))
            hub.push(folders[number], _name(number))
        elif known := [reference for reference, _ in hub.entries()]:
            read(hub.pull(draw.choice(known)))


def _name(number: int) -> str:
    return f"team/delta-{number % NAMES}:v{number}"
