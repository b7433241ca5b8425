"""Pairs of methods: each method with the next one, first or second by turns; `make pairs` tries
all, in both orders.
"""

from __future__ import annotations

import pytest
from tests.methods.test_conformance import METHODS

from deltatune.core.grammar import parse
from deltatune.core.method import MERGED as MERGING_FACES
from deltatune.testing.pairs import MERGED, SUMMED, pair

SINGLE = [one for one in METHODS if len(parse(one).methods) == 1]
PAIRS = [
    (one, other) if place % 2 else (other, one)
    for place, (one, other) in enumerate(zip(SINGLE, SINGLE[1:] + SINGLE[:1], strict=True))
]
# What cannot stand together, by the methods' names, and what the refusal says.
REFUSED = {"full": "stands alone", "reft": "virtual tokens", "pals": "virtual tokens"}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_pair_acts_together_or_is_refused_with_a_reason(first: str, second: str) -> None:
    found = pair(first, second, "bert")
    methods = parse(f"{first} + {second}").methods
    if found not in (MERGED, SUMMED):
        assert any(method.name in REFUSED for method in methods), found
    if found == MERGED:
        assert all(method.face in MERGING_FACES for method in methods)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("road(group=4)", "lora(rank=3)"),
        ("road(group=4, at='linear')", "bitfit"),
        ("ia3", "lora(rank=3, at='attention.k | ffn.down')"),
        ("hadamard(at='linear')", "lora(rank=3, at='linear') + bitfit"),
        ("bitfit + lora(rank=3)", "road(group=4) + lora(rank=2)"),
    ],
)
def test_what_turns_or_scales_an_output_keeps_its_place_among_what_adds_to_it(
    first: str, second: str
) -> None:
    assert pair(first, second, "bert") == MERGED
    assert pair(second, first, "bert") == MERGED
