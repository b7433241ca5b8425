"""Randomness of a run: seeded afresh before each forward pass, and never left behind.

What a forward pass draws follows from (seed, number of the pass) alone. So a checkpoint needs no
state of a generator, a resumed run draws what the uninterrupted one drew, and how often a run is
evaluated cannot change what it learns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["isolated_random_state", "seed_forward"]


@contextmanager
def isolated_random_state(device: torch.device) -> Iterator[None]:
    """Gives the global generators of torch, numpy and Python back as they were.

    Args:
        device: whose generator is kept beside that of the CPU.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def seed_forward(seed: int, forward: int, device: torch.device) -> None:
    """Seeds the global generators for one forward pass.

    Args:
        seed: of the run.
        forward: the number of the pass, from 0.
        device: where it runs.
    """
    # SeedSequence spreads neighbouring numbers over all bits, which `manual_seed` does not.
    words = np.random.SeedSequence([seed, forward]).generate_state(3, np.uint32)
    drawn = int(words[0]) << 32 | int(words[1])
    # Not `torch.manual_seed`: where a GPU is not in use it takes milliseconds, to note who called.
    torch.default_generator.manual_seed(drawn)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(drawn)
    np.random.seed(int(words[2]))
    random.seed(int(words[2]))
