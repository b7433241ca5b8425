"""What every measurement shares: contenders take turns, and a row says what was asked of it."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.shares import shares
from deltatune.study.machine import processor

__all__ = ["Row", "Size", "interleave", "machine", "row", "saved_bytes", "step_memory", "versions"]

Work = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """How large the measured models are.

    Attributes:
        name: "full" or "quick".
        layers: of the BERT-base shape; the others are the issue's.
        rounds: how often every contender is measured.
        dtype: of the backbone where a row does not say fp32.
    """

    name: str
    layers: int
    rounds: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        id: number of the row in the table of goals, with that of the figure.
        metric: what was measured, with its unit.
        peer, floor, ours: in that unit; None where there is none.
        ratio: the figure that `must` and `stretch` are about.
        must, stretch: bounds on it.
        holds: whether `must` does.
        profile: where it does not, the milliseconds of each contender by kind; see `shares`.
    """

    id: str
    metric: str
    peer: float | None
    floor: float | None
    ours: float
    ratio: float
    must: str
    stretch: str
    holds: bool
    profile: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values, four significant digits."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def row(
    id: str,
    metric: str,
    ours: float,
    *,
    peer: float | None = None,
    floor: float | None = None,
    over: str,
    must: float,
    stretch: float | None = None,
    contenders: Mapping[str, Work] | None = None,
) -> Row:
    """A row whose ratio is taken from its figures.

    Args:
        id, metric, ours, peer, floor: see `Row`.
        over: "floor" or "peer" for ours over it, at most `must`; "gain" for the peer over ours, at
            least `must`; "itself" for ours alone, at most `must`.
        must, stretch: the bounds.
        contenders: what is profiled where the bound does not hold.
    """
    if over == "gain":
        assert peer is not None
        ratio, sign = peer / ours, ">="
    else:
        below = {"floor": floor, "peer": peer, "itself": 1.0}[over]
        assert below is not None
        ratio, sign = ours / below, "<="
    holds = ratio >= must if sign == ">=" else ratio <= must
    wish = "" if stretch is None else f"{sign} {stretch:g}"
    watched = {} if holds or contenders is None else contenders
    profile = {name: shares(work) for name, work in watched.items()}
    return Row(id, metric, peer, floor, ours, ratio, f"{sign} {must:g}", wish, holds, profile)


def interleave(contenders: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """The shortest time of each contender in seconds, over rounds in random order.

    Every contender runs once before the first round.
    """
    order = random.Random(0)
    for work in contenders.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            started = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - started)
    return {name: min(held) for name, held in times.items()}


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward keeps for its backward pass: distinct storages, parameters apart.

    They are read off the graph: hooks on what is saved would change what is.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    loss = forward()
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(held.values())


def _saved(node: Any) -> Iterator[torch.Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    for name in names:
        value = getattr(node, name)
        several = value if isinstance(value, list | tuple) else (value,)
        yield from (one for one in several if isinstance(one, torch.Tensor))


def step_memory(prepare: Callable[[], Work]) -> int:
    """Bytes by which two steps raise the peak of a fresh process; forked, so call it early."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent did not come along
            step = prepare()
            before = _resident()
            step()
            step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writing, str(peak - before).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("The measured process died.")
    return int(text)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def machine() -> dict[str, Any]:
    """What it was measured on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products = {
        str(dtype).removeprefix("torch."): _peak(a.to(dtype), b.to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": "amx_bf16" in text,
        "gflops_of_1024_products": products,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _peak(a: torch.Tensor, b: torch.Tensor) -> int:
    shortest = interleave({"product": lambda: a @ b}, 7)["product"]
    return round(2 * 1024**3 / shortest / 1e9)


def versions(names: Sequence[str] = ("torch", "transformers", "peft")) -> dict[str, str]:
    """Versions of what was measured."""
    return {name: metadata.version(name) for name in names}
