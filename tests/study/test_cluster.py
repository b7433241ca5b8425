"""Cells on the workers of a real Ray cluster of two nodes, on this machine."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.study.fake import Slow, execute
from tests.study.test_store import make_cell

from deltatune.core.errors import StateError, TrainingError, UnknownNameError, UnsupportedError
from deltatune.study import cluster, libraries
from deltatune.study.cell import Cell, CellResult
from deltatune.study.cluster import open_pool
from deltatune.study.runner import Event, Hands, Pool, Together, run
from deltatune.study.store import JournalStore, this_process

ROOT = Path(__file__).resolve().parents[2]


def nothing(backbone: str, task: str, protocol: str) -> dict[str, Any]:
    """A `describe` that knows nothing."""
    return {}


def other_weights(backbone: str, task: str, protocol: str) -> dict[str, Any]:
    return {"revision": "weights:2"}


def without_data(backbone: str, task: str, protocol: str) -> dict[str, Any]:
    raise StateError("There are no rows.")


@dataclass(frozen=True)
class Kinds:
    """Cells of every kind: seed 3 fails by itself, and seed 4 ends its process.

    Attributes:
        slow: carries them out.
        doomed: the node on which none ends; elsewhere none does before one has begun there.
    """

    slow: Slow
    doomed: str = ""

    def __call__(self, cell: Cell) -> CellResult:
        import ray

        result = self.slow(cell)
        if ray.get_runtime_context().get_node_id() == self.doomed:
            time.sleep(600)
        while self.doomed and len({worker for _, worker in self.slow.noted()}) < 2:
            time.sleep(0.05)
        if cell.seed == 3:
            raise TrainingError("The loss is not finite at step 3.")
        if cell.seed == 4:
            os._exit(1)
        return result

    def together(self, cells: Sequence[Cell], told: Any) -> None:
        for cell in reversed(cells):
            told(cell, self.slow(cell))


class Nodes:
    """A cluster whose second node can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.small = {"num_cpus": 1, "object_store_memory": 80 << 20}
        head = {**self.small, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(**self.small)

    def kill_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Nobody else may use its ports; a token of Ray's own making would be written to the home.
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
        # Only now: Ray reads these when it is imported.
        pytest.importorskip("ray", reason="the extra cluster is not installed")
        found = Nodes()
        try:
            yield found
        finally:
            found.cluster.shutdown()


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[Pool]:
    with open_pool(f"ray:{nodes.cluster.address}", nothing) as pool:
        assert pool is not None
        yield pool


def test_a_node_may_die_in_the_middle(nodes: Nodes, pool: Pool, tmp_path: Path) -> None:
    kinds = Kinds(Slow(tmp_path / "notes", 0.01), nodes.second.node_id)
    store, cells = JournalStore(tmp_path), [make_cell(seed) for seed in range(10)]

    def watch(event: Event) -> None:
        """Kills the node at the first result, which the other one has."""
        if event.kind == "done" and nodes.second is not None:
            at_work = {claim.worker for claim in store.claimed().values()}
            assert at_work == {worker for _, worker in kinds.slow.noted()} and len(at_work) == 2
            nodes.kill_second()
            nodes.second = None

    outcome = run(cells, kinds, store, pool=pool, watch=watch, patience=0.2)
    assert set(outcome.done) == {make_cell(s).id for s in range(10) if s not in (3, 4)}
    assert all(found == execute(store.recorded()[key].cell) for key, found in outcome.done.items())
    assert {r.id for r in store.recorded().values()} == {cell.id for cell in cells}
    assert len(store.records()) == 10 and not store.claimed()
    own, ended = (outcome.failed[make_cell(seed).id] for seed in (3, 4))
    assert own.error == "TrainingError" and "in __call__" in own.trace
    assert ended.error == "StateError" and "3 workers are gone that had this cell" in ended.message
    ran = Counter(seed for seed, _ in kinds.slow.noted())
    assert ran[4] == 3 and sorted((ran[0], ran[1])) == [1, 2], "one of them was on the node"
    assert sum(ran.values()) == 10 + 2 + 1, "what had ended is not run again"
    assert this_process() not in {worker for _, worker in kinds.slow.noted()}


def test_cells_of_one_base_are_one_task(pool: Pool, tmp_path: Path) -> None:
    kinds = Kinds(Slow(tmp_path / "notes", 0.01))
    together = Together(3, one_base, kinds.together)
    cells = [make_cell(seed) for seed in range(5)]
    outcome = run(cells, kinds, JournalStore(tmp_path), together=together, pool=pool, patience=0.2)
    assert len(outcome.done) == 5
    assert [seed for seed, _ in kinds.slow.noted()] == [2, 1, 0, 4, 3]
    assert len({worker for _, worker in kinds.slow.noted()}) == 1, "a worker stays"


def one_base(cell: Cell) -> int:
    return 0


def test_an_interrupt_ends_the_workers_that_are_at_work(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, store, wait = Slow(tmp_path / "notes", 600), JournalStore(tmp_path), pool.wait

    def interrupted(seconds: float) -> None:
        if slow.noted():
            raise KeyboardInterrupt
        wait(seconds)

    monkeypatch.setattr(pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([make_cell()], slow, store, pool=pool, patience=0.1)
    assert not store.claimed() and not store.records()
    ((_, worker),) = slow.noted()
    until = time.monotonic() + 30
    while psutil.pid_exists(int(worker.partition(":")[2])):
        assert time.monotonic() < until, f"{worker} goes on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("describe", "message"),
    [(other_weights, "revision is 'weights:2', and None"), (without_data, "There are no rows")],
)
def test_a_worker_with_other_weights_or_rows_refuses(describe: Any, message: str) -> None:
    worker = cluster._Worker(Hands(execute), describe, "no such folder")
    with pytest.raises(StateError, match=message):
        worker.carry_out([make_cell()])


def test_a_worker_with_other_code_is_not_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    name, code = cluster._Worker(Hands(execute), nothing, os.getcwd()).badge()
    assert cluster._admitted(name, code) == this_process()
    monkeypatch.setattr(cluster, "code_version", lambda: "0" * 16)
    with pytest.raises(StateError, match="Install the same on every machine"):
        cluster._admitted(name, code)


def test_an_artefact_elsewhere_names_its_machine(tmp_path: Path) -> None:
    result = execute(make_cell()).model_copy(update={"artefact": str(tmp_path)})
    assert cluster._located(result, "there:12") == result, "the file system is shared"
    gone = result.model_copy(update={"artefact": str(tmp_path / "delta")})
    found = cluster._located(gone, "there:12")
    assert isinstance(found, CellResult) and found.artefact == f"there:{tmp_path / 'delta'}"


def test_a_place_is_ray_or_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(None, nothing) as pool:
        assert pool is None
    with pytest.raises(UnknownNameError, match="Did you mean 'ray'"), open_pool("rai", nothing):
        pass

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(libraries.importlib, "import_module", missing)
    with (
        pytest.raises(UnsupportedError, match=r"pip install 'deltatune\[cluster\]'"),
        open_pool("ray", nothing),
    ):
        pass
