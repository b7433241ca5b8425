"""Memory: the highest that a run takes and what is free, read from the system and the device."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

__all__ = [
    "TRAINING",
    "VALUES_AND_TRAINING",
    "free_memory",
    "largest_count",
    "peak_device_memory",
    "peak_memory",
    "reset_peaks",
]

# Bytes for one trained entry: its gradient, AdamW's two moments and the best value so far; and with
# the value itself.
TRAINING = 16
VALUES_AND_TRAINING = 20

_STATUS = Path("/proc/self/status")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def reset_peaks() -> None:
    """Starts the measurement, where the system allows it (Linux, CUDA)."""
    # "5" resets the high-water mark of the resident memory: proc(5). Elsewhere the peak is that of
    # the whole process until now, which may be too high, never too low.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """The highest resident memory of this process since `reset_peaks`, in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def peak_device_memory() -> int:
    """The highest memory taken on the accelerator since `reset_peaks`, in bytes; 0 without."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; in a container (cgroup v2) up to its limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        free = min(free, int(_LIMIT.read_text()) - int(_USED.read_text()))
    return free


def largest_count(size: int, device: torch.device) -> int:
    """How many pieces of so many bytes fit into what is free on a device."""
    return max(0, free_memory(device) // max(size, 1))
