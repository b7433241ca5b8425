from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.training.memory import peak_device_memory, peak_memory, reset_peaks


def test_the_peak_is_measured_anew() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the high-water mark")
    block = bytearray(120_000_000)
    del block
    before = peak_memory()
    reset_peaks()
    after = peak_memory()
    if before == after:
        pytest.skip("this system does not reset the high-water mark")
    assert after < before - 80_000_000
    block = bytearray(120_000_000)
    assert peak_memory() > after + 80_000_000
    del block
    assert peak_device_memory() >= 0
