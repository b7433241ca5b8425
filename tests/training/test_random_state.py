from __future__ import annotations

import random

import numpy as np
import torch

from deltatune.training.random_state import isolated_random_state, seed_forward

CPU = torch.device("cpu")


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_a_pass_draws_by_its_seed_and_number() -> None:
    with isolated_random_state(CPU):
        found = []
        for seed, forward in ((0, 0), (0, 1), (1, 0), (0, 0)):
            seed_forward(seed, forward, CPU)
            found.append(drawn())
    assert found[0] == found[3]
    for place in range(3):
        assert len({values[place] for values in found}) == 3


def test_the_global_state_comes_back_also_after_an_error() -> None:
    def set_all() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    set_all()
    expected = drawn()
    set_all()
    try:
        with isolated_random_state(CPU):
            seed_forward(5, 5, CPU)
            raise KeyError
    except KeyError:
        pass
    assert drawn() == expected
