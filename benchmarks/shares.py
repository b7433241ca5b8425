"""Where the time of a piece of work goes, by the kind of what the processor does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["KINDS", "shares"]

REST = "outside of operations"
# In the order in which they are asked; a name belongs to the first kind that has a part of it.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "products": ("mm", "linear", "matmul", "dot"),
    "optimiser": ("_fused_adam", "_foreach", "lerp", "addcdiv", "addcmul"),
    "random numbers": ("bernoulli", "random", "dropout", "normal_", "uniform_"),
    "copies": ("copy", "cat", "stack", "clone", "index", "gather", "embedding", "fill", "zero"),
}
KINDS = (*_PARTS, "other passes", REST)


def shares(work: Callable[[], object]) -> dict[str, float]:
    """The milliseconds of one run, by kind, watched, which slows it.

    All operations of torch that are of no other kind are passes over tensors; what no operation
    takes is Python's, numpy's or the disk's.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        began = time.perf_counter()
        work()
        whole = 1e3 * (time.perf_counter() - began)
    found = dict.fromkeys(KINDS, 0.0)
    events: Any = seen.key_averages()
    for event in events:
        if event.key.startswith(("aten::", "mkldnn", "onednn")):
            found[_kind(event.key)] += event.self_cpu_time_total / 1e3
    found[REST] = max(0.0, whole - sum(found.values()))
    return {kind: round(spent, 3) for kind, spent in found.items()}


def _kind(name: str) -> str:
    matching = (kind for kind, parts in _PARTS.items() if any(part in name for part in parts))
    return next(matching, "other passes")
