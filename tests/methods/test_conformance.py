"""Every method on every family, by the one suite that the package ships."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from deltatune import api
from deltatune.core.errors import TargetError
from deltatune.testing.compiled_laws import law_compiled
from deltatune.testing.families import FAMILIES
from deltatune.testing.methods import Case, Law, laws

SPECIAL = " ".join(map(str, range(2, 60)))  # every row of a batch has some of these

ARMS = (
    "lora(rank=3)",
    "adapter(bottleneck=4)",
    "bitfit",
    "last_layer",
    "prompt(length=3)",
    "prefix(length=3)",
    "full",
    "lora(rank=2) + adapter(bottleneck=4) + bitfit + prefix(length=2) + prompt(length=2)",
)
# Here on one family each, by turns; `make matrix` holds them on all.
CATALOGUE = (
    "adapter_drop(bottleneck=4, dropped=1)",
    "boft(block=4, depth=2)",
    "c3a(block=4)",
    "compacter(bottleneck=4, terms=2)",
    "compacter_plus_plus(bottleneck=4, terms=2)",
    "dora(rank=3)",
    "fourierft(count=20)",
    "gralora(rank=4)",
    "hadamard",
    "hira(rank=3)",
    "hra(rank=4)",
    "ia3",
    "krona",
    "ln_tuning",
    "loha(rank=3)",
    "lokr(rank=1)",
    "lora_fa(rank=3)",
    "low_rank_adapter(bottleneck=4)",
    "miss(rank=3)",
    "multilora(rank=2)",
    "oft(block=4)",
    "phm_adapter(bottleneck=4, terms=2)",
    "red",
    "residual_adapter(bottleneck=4)",
    "road(group=4)",
    "rslora(rank=3)",
    "shira(rank=2)",
    "vera(rank=8)",
    "pfeiffer(bottleneck=4, up_std=0.0)",
    "parallel(bottleneck=4)",
    "selective_module(budget=0.3)",
    "prefix(length=3, reparameterise=True, middle=8)",
    "tiny_attention(heads=2)",
    "pals(width=8, heads=2)",
    "reft(rank=2, first=1, last=2)",
    "direft(rank=2, separate=True)",
    "noreft(rank=2)",
    f"pasta(length=2, tokens='{SPECIAL}')",
    "hyperformer(bottleneck=4, embedding=4, middle=6, projected=5)",
    "invertible(bottleneck=4)",
)
METHODS = CATALOGUE + ARMS


# Fused experts have no place of their own for the maps of a feed-forward.
DENSE = tuple(name for name in FAMILIES if name not in ("mixtral", "gpt_oss"))
CASES = (
    *itertools.starmap(Case, itertools.product(ARMS, FAMILIES)),
    *map(Case, CATALOGUE, itertools.cycle(DENSE)),
)


def named(case: Case) -> str:
    return f"{case.method}-{case.family}"


@pytest.mark.parametrize("law", laws(), ids=lambda law: law.__name__.removeprefix("law_"))
@pytest.mark.parametrize("case", [case for case in CASES if not case.lacks], ids=named)
def test_law(case: Case, law: Law, tmp_path: Path) -> None:
    law(case, tmp_path)


# One of every face; `make matrix` holds every method on every family to this law.
@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "prompt", "prefix"])
def test_one_graph_compiled_before_the_delta_came(method: str, tmp_path: Path) -> None:
    law_compiled(Case(method, "bert"), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["ia3", "red"])
def test_what_acts_at_a_feed_forward_asks_for_one(method: str, family: str) -> None:
    with pytest.raises(TargetError, match=r"'ffn.down' matches nothing.* Roles here: .*experts"):
        api.plan(FAMILIES[family].build(), method)


@pytest.mark.parametrize("case", [case for case in CASES if case.lacks], ids=named)
def test_a_lacking_face_is_refused_in_a_sentence(case: Case) -> None:
    assert "Use a method with another face" in case.refusal()
