"""Cells on several machines: workers of a Ray cluster that carry out groups of cells.

Ray finds the places, starts the processes and says when one is gone. A worker is a process of its
own for as long as the study runs, so that a backbone is loaded once in each. Claims and records
stay with the process that runs the study: a worker only answers.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.core.errors import DeltatuneError, StateError, UnknownNameError
from deltatune.study.cell import Cell
from deltatune.study.comparison import Describe
from deltatune.study.libraries import library
from deltatune.study.runner import Failure, Found, Hands, Pool, Told
from deltatune.study.source import code_version
from deltatune.study.store import this_process

__all__ = ["RayPool", "open_pool"]

# A group whose worker is gone is given to another one. Who has cost so many is itself the reason.
_MOST_LOSSES = 3


@contextmanager
def open_pool(on: str | None, describe: Describe) -> Iterator[Pool | None]:
    """Gives the workers of a place; they end with it.

    Args:
        on: "ray" for the cluster that the variable RAY_ADDRESS names, or that runs on this machine,
            or else one of this machine alone; "ray:ADDRESS" for another one, "ray:10.0.0.1:6379" or
            "ray:ray://10.0.0.1:10001"; None for this process, without workers.
        describe: (backbone, task, protocol) -> fields of a cell. What it says on a worker must be
            what the cells say.

    Raises:
        UnknownNameError: there is no such place.
        UnsupportedError: Ray is not installed.
        StateError: there is no cluster at the address.
    """
    if on is None:
        yield None
        return
    place, _, address = on.partition(":")
    if place != "ray":
        raise UnknownNameError("place to run cells", place, ["ray"])
    ray = library("ray", extra="cluster")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    pool = RayPool(ray, describe)
    try:
        yield pool
    finally:
        pool.close()
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a study tells nobody that it runs
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "here, nor can one be started"
        raise StateError(
            f"There is no Ray cluster {where} ({error}). Start one: `ray start --head` on one "
            "machine, then `ray start --address=...`, which it prints, on the others."
        ) from error


class _Worker:
    """A process that carries out cells, and keeps what it has loaded."""

    def __init__(self, hands: Hands, describe: Describe, folder: str) -> None:
        self._hands, self._describe = hands, describe
        if os.path.isdir(folder):  # paths that are relative mean the same, where they can
            os.chdir(folder)

    def badge(self) -> tuple[str, str]:
        """Who it is, and with which code."""
        return this_process(), code_version()

    def carry_out(self, cells: Sequence[Cell]) -> list[Found]:
        """What became of cells, in their order. Raises StateError if they are not the same here."""
        for cell in cells:
            self._check(cell)
        return self._hands(cells)

    def _check(self, cell: Cell) -> None:
        where = f"On {this_process()}, of {cell}:"
        try:
            seen = self._describe(cell.backbone, cell.task, cell.protocol)
        except DeltatuneError as error:
            raise StateError(f"{where} {error}") from None
        for name, value in seen.items():
            if value != getattr(cell, name):
                raise StateError(
                    f"{where} {name} is {value!r}, and {getattr(cell, name)!r} where the study was "
                    "planned. Give every machine the same task data and weights."
                )


@dataclass
class _Member:
    """A worker as it is seen from here; without a name until it has shown its badge."""

    actor: Any
    name: str = ""


@dataclass
class _Group:
    """Cells that were submitted, and how many workers they have cost."""

    cells: Sequence[Cell]
    told: Told
    losses: int = 0


class RayPool(Pool):
    """Workers of a Ray cluster: one for each GPU, or, where it has none, one for each CPU.

    Nodes may come and go. A group whose worker is gone, with its node or alone, is carried out by
    another one; the third time, that is what became of its cells.

    Args:
        ray: the module, connected.
        describe: see `open_pool`.
    """

    def __init__(self, ray: Any, describe: Describe) -> None:
        self._ray, self._describe = ray, describe
        self._hands: Hands | None = None
        self._most = 0
        self._members: list[_Member] = []
        self._idle: list[_Member] = []
        self._calls: dict[Any, tuple[_Member, _Group | None]] = {}  # None: it shows its badge
        self._again: deque[_Group] = deque()

    def hire(self, hands: Hands, most: int) -> None:
        """See `Pool.hire`."""
        if hands != self._hands:
            self.close()
        self._hands, self._most = hands, most
        self._recruit()

    def free(self) -> str | None:
        """See `Pool.free`."""
        return self._idle[-1].name if self._idle else None

    def submit(self, cells: Sequence[Cell], told: Told) -> None:
        """See `Pool.submit`."""
        self._give(_Group(cells, told))

    def wait(self, seconds: float) -> None:
        """See `Pool.wait`. Raises StateError if a worker would give other results than this
        process.
        """
        self._recruit()
        if not self._calls:  # whoever has the cells that are left, it is not these workers
            time.sleep(seconds)
            return
        ended, _ = self._ray.wait(list(self._calls), timeout=seconds)
        for call in ended:
            self._collect(call)
        while self._again and self._idle:
            self._give(self._again.popleft())

    def stop(self) -> None:
        """See `Pool.stop`."""
        self._again.clear()
        for member, group in list(self._calls.values()):
            if group is not None:
                self._dismiss(member)

    def close(self) -> None:
        """Ends all workers."""
        for member in list(self._members):
            self._dismiss(member)

    def _recruit(self) -> None:
        """Starts as many workers as there is room for by now; where there is none yet, one, which
        waits for it.
        """
        held = self._ray.cluster_resources()
        gpus = int(held.get("GPU", 0))
        room = max(1, gpus or int(held.get("CPU", 0)))
        start = self._ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Worker)
        while len(self._members) < min(room, self._most):
            actor = start.remote(self._hands, self._describe, os.getcwd())
            member = _Member(actor)
            self._members.append(member)
            self._calls[actor.badge.remote()] = member, None

    def _give(self, group: _Group) -> None:
        member = self._idle.pop()
        self._calls[member.actor.carry_out.remote(group.cells)] = member, group

    def _collect(self, call: Any) -> None:
        """Takes what a worker answers. Raises StateError, see `wait`."""
        errors = self._ray.exceptions
        member, group = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError) as error:
            self._dismiss(member)
            if group is not None:
                self._lose(group, member.name, error)
            return
        if group is None:
            member.name = _admitted(*answer)
        self._idle.append(member)
        if group is not None:
            group.told([_located(found, member.name) for found in answer])

    def _lose(self, group: _Group, worker: str, error: Exception) -> None:
        group.losses += 1
        if group.losses < _MOST_LOSSES:
            self._again.append(group)
            return
        found = Failure.of(
            StateError(
                f"{group.losses} workers are gone that had this cell, the last one {worker}: "
                f"{error} Too little memory is the commonest reason."
            )
        )
        group.told([found] * len(group.cells))

    def _dismiss(self, member: _Member) -> None:
        """Ends a worker, wherever it is: what cannot be reached must not go on either."""
        self._ray.kill(member.actor)
        self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        self._calls = {call: held for call, held in self._calls.items() if held[0] is not member}


def _admitted(name: str, code: str) -> str:
    """Returns the name of a worker. Raises StateError if its results are not those of this code."""
    if code != code_version():
        raise StateError(
            f"{name} has other code or other versions of libraries than this process ({code}, not "
            f"{code_version()}). Install the same on every machine, with constraints.txt."
        )
    return name


def _located(found: Found, worker: str) -> Found:
    """Puts the machine before the folder of an artefact that cannot be seen from here."""
    if isinstance(found, Failure) or found.artefact is None or Path(found.artefact).exists():
        return found
    host = worker.partition(":")[0]
    return found.model_copy(update={"artefact": f"{host}:{found.artefact}"})
