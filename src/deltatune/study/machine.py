"""What a result was computed on, in words, as the files of the system say it."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

__all__ = ["machine", "processor"]

PROCESSORS = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")


@functools.cache
def processor() -> str:
    """The name of the processor; its architecture where the system does not say more."""
    named = next(_values(PROCESSORS, "model name"), "")
    return named or platform.processor() or platform.machine()


@functools.cache
def machine(device: str) -> str:
    """This machine: "Intel(R) Xeon(R) Processor, 2 cores, 24 GiB", and its GPUs if one was used.

    Args:
        device: "cpu", "cuda:0": what was computed on.
    """
    said = [processor(), f"{os.cpu_count()} cores"]
    if "SC_PHYS_PAGES" in os.sysconf_names:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        said.append(f"{pages * size / 2**30:.0f} GiB")
    if device.startswith("cuda"):
        files = GPUS.glob("*/information")
        said += sorted({name for file in files for name in _values(file, "Model")})
    return ", ".join(said)


def _values(file: Path, key: str) -> Iterator[str]:
    """Yields what follows a key in a file of lines "key : value"; nothing if it is not there."""
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()
