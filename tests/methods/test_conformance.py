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

# On every family: the seams that differ most between them, and one of every face together.
ARMS = (
    "lora(rank=3)",
    "prompt(length=3)",
    "prefix(length=3)",
    "lora(rank=2) + adapter(bottleneck=4) + bitfit + prefix(length=2) + prompt(length=2)",
)
# Here on one family each, by turns; `make matrix` holds them on all.
CATALOGUE = (
    "adalora(rank=3, final_rank=2)",
    "adamix(bottleneck=4, experts=3)",
    "adamix(bottleneck=4, experts=2, shared_up=False)",
    "adapter_drop(bottleneck=4, dropped=1)",
    "adapter_drop_robust(bottleneck=4, dropped=1)",
    "adapter_fusion(bottleneck=4, experts=2)",
    "boft(block=4, depth=2)",
    "c3a(block=4)",
    "child_tuning",
    "child_tuning_free",
    "compacter(bottleneck=4, terms=2)",
    "compacter_plus_plus(bottleneck=4, terms=2)",
    "delta_lora(rank=3)",
    "diff_pruning",
    "delora(rank=3, alpha=1.0)",
    "dora(rank=3)",
    "dylora(rank=3)",
    "fourierft(frequencies=20)",
    "fuse(pfeiffer(bottleneck=3), pfeiffer(bottleneck=2))",
    "gate(lora(rank=2), pfeiffer(bottleneck=3), prefix(length=2))",
    "gralora(rank=4)",
    "hadamard",
    "hira(rank=3)",
    "hra(rank=4)",
    "ia3",
    "increlora(rank=3, final_rank=2)",
    "kernel_mix(heads=4, rank=2, shared=1, at='attention.q | attention.output')",
    "intrinsic(dimension=300, at='block.linear | norm')",
    "krona",
    "ln_tuning",
    "loha(rank=3)",
    "lokr(rank=1)",
    "loftq(rank=3)",
    "lora_fa(rank=3)",
    "lora_plus(rank=3)",
    "lora_xs(rank=3)",
    "low_rank_adapter(bottleneck=4)",
    "lt_sft",
    "milora(rank=3)",
    "masking",
    "miss(rank=3)",
    "mora(rank=2)",
    "mora(rank=2, rotate=True)",
    "moelora(rank=4, experts=2, embedding=5)",
    "molora(rank=2, experts=3)",
    "mov(experts=3)",
    "mov(experts=3, chosen=2)",
    "multilora(rank=2)",
    "oft(block=4)",
    "olora(rank=3)",
    "phm_adapter(bottleneck=4, terms=2)",
    "propetl(bottleneck=4)",
    "pruned_bitfit",
    "pruned_parallel(bottleneck=4)",
    "pruned_prefix(length=3)",
    "pissa(rank=3)",
    "poly(rank=2, experts=3)",
    "qa_lora(rank=3, group=8)",
    "randlora(rank=8, alpha=32.0)",
    "random_subset(share=0.2, at='block.linear | norm')",
    "red",
    "residual_adapter(bottleneck=4)",
    "road(group=4)",
    "road(group=4, variant=2)",
    "road(group=4, variant=4)",
    "route(lora(rank=2), dora(rank=2), bitfit)",
    "rslora(rank=3)",
    "sam",
    "shira(rank=2)",
    "snip_adapter(bottleneck=8)",
    "sparse_adapter(bottleneck=8)",
    "vb_lora(rank=2, vectors=6, block=4)",
    "trainable_tokens(tokens='2:97')",
    "x_lora(lora(rank=2), pfeiffer(bottleneck=3), prefix(length=2))",
    "vera(rank=8)",
    "waveft(coefficients=20)",
    "0.5 * lora(rank=3)",
    "-0.5 * adapter(bottleneck=4)",
    "0.5 * (dora(rank=2) + bitfit)",
    "pfeiffer(bottleneck=4, up_std=0.0)",
    "intrinsic_prompt(length=3, dimension=5, middle=8)",
    "attempt(length=3, sources=2, middle=5, temperature=0.1)",
    "mpt(length=3)",
    "mpt(length=3, frozen=True)",
    "p_tuning(length=3, middle=8)",
    "p_tuning(length=3, encoder='lstm', middle=4)",
    "llama_adapter(length=3)",
    "parallel(bottleneck=4)",
    "last_layer",
    "selective_module(budget=0.3)",
    "prefix(length=3, reparameterise=True, middle=8)",
    "robust_prefix(length=3)",
    "difference(at='attention')",
    "tiny_attention(heads=2)",
    "pals(width=8, heads=2)",
    "lst(reduction=4, heads=2)",
    "reft(rank=2, first=1, last=2)",
    "direft(rank=2, separate=True)",
    "noreft(rank=2)",
    f"pasta(length=2, tokens='{SPECIAL}')",
    "hyperformer(bottleneck=4, embedding=4, middle=6, code=5)",
    "invertible(bottleneck=4)",
    "corda(rank=3)",
    "eva(rank=3)",
    "fish",
    "lora_ga(rank=3)",
    "intrinsic_prompt(length=3, dimension=5, middle=8, decoder=True)",
    "adapter(bottleneck=4)",
    "bitfit",
    "full",
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
