"""Fingerprints: what is left out where it is not looked at changes no verdict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.core.fingerprint import fingerprint
from deltatune.testing.families import FAMILIES


def changed() -> nn.Module:
    model = FAMILIES["bert"].build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[7] += 0.5
    return model


OTHERS = {
    "itself": FAMILIES["bert"].build,
    "one number apart": changed,
    "in bf16": lambda: FAMILIES["bert"].build().to(torch.bfloat16),
    "changed, in bf16": lambda: changed().to(torch.bfloat16),
    "another architecture": FAMILIES["gpt2"].build,
    "without values": lambda: FAMILIES["bert"].build().to("meta"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_comparison_computes_what_it_looks_at_and_no_more(name: str) -> None:
    made_for, model = fingerprint(FAMILIES["bert"].build()), OTHERS[name]()
    whole, short = fingerprint(model), fingerprint(model, like=made_for)
    assert made_for.difference(short) == made_for.difference(whole)
    assert (made_for.difference(whole) is None) == (name in ("itself", "in bf16", "without values"))
    there = (short.weights is not None, short.weights_bf16 is not None)
    expected = {"itself": (True, False), "one number apart": (True, False)}
    expected |= {"in bf16": (False, True), "changed, in bf16": (False, True)}
    assert there == expected.get(name, (False, False))
    if short.weights is not None:
        assert short.weights == whole.weights
    if short.weights_bf16 is not None:
        assert short.weights_bf16 == whole.weights_bf16


def test_it_does_not_depend_on_how_many_threads_read() -> None:
    model, threads = FAMILIES["t5"].build(), torch.get_num_threads()
    try:
        found = set()
        for count in (1, 4):
            torch.set_num_threads(count)
            found.add(fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
