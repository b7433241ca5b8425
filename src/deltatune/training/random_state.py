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
def isolated_random_state() -> Iterator[None]:
    """Gives the global generators of torch (all devices), numpy and Python back as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def seed_forward(seed: int, forward: int) -> None:
    """Seeds the global generators for one forward pass.

    Args:
        seed: of the run.
        forward: the number of the pass, from 0.
    """
    # SeedSequence spreads neighbouring numbers over all bits, which `manual_seed` does not.
    words = np.random.SeedSequence([seed, forward]).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    random.seed(int(words[2]))
