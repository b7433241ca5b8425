"""The highest memory that a run takes, read from the operating system."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_device_memory", "peak_memory", "reset_peaks"]

_STATUS = Path("/proc/self/status")


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
