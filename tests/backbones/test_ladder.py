"""The ladder that travels with the package: there, small, whole, and better than chance."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5ForConditionalGeneration

from deltatune.backbones.ladder import EMBEDDED, TOKENIZER, embedded
from deltatune.core.errors import UnknownNameError

LADDER = ("t5-nano", "t5-micro", "t5-mini")
PARAMETERS = {"t5-nano": 2_230_656, "t5-micro": 5_411_328, "t5-mini": 12_459_200}
MEBIBYTE = 2**20
TEXT = (
    "The town lies on the left bank of the river, and was for a long time the seat of the bishop. "
    "In the last war most of the old houses were lost, but the church was built again."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_the_ladder_is_complete() -> None:
    assert set(EMBEDDED) == set(LADDER)
    for folder in EMBEDDED.values():
        assert {"config.json", "CARD.md", "loss.csv"} <= {path.name for path in folder.iterdir()}


def test_the_files_stay_small() -> None:
    sizes = [p.stat().st_size for p in TOKENIZER.parent.rglob("*") if p.is_file()]
    assert max(sizes) <= 15 * MEBIBYTE
    assert sum(sizes) <= 40 * MEBIBYTE


@pytest.mark.parametrize("name", LADDER)
def test_each_loads_and_predicts_text(name: str) -> None:
    backbone = embedded(name)
    assert backbone.form == "encoder_decoder"
    assert (backbone.name, backbone.revision) == (name, None)
    assert backbone.model.num_parameters() == PARAMETERS[name]
    assert not backbone.model.training
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}

    words = backbone.tokenizer(TEXT, return_tensors="pt").input_ids[:, :-1]
    half = words.shape[1] // 2
    torch.manual_seed(0)
    random = T5ForConditionalGeneration(backbone.model.config)
    with torch.no_grad():
        losses = [
            float(m(input_ids=words[:, :half], labels=words[:, half:].contiguous()).loss)
            for m in (backbone.model, random.eval())
        ]
    assert losses[0] < losses[1] - 2.0


def test_the_first_sentinel_comes_last(tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 8192
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == 8191
    assert tokenizer.convert_tokens_to_ids("<extra_id_99>") == 8092


def test_pairs_and_ends(tokenizer) -> None:
    one, two = tokenizer("a").input_ids, tokenizer("b").input_ids
    assert one[-1] == two[-1] == tokenizer.eos_token_id
    assert tokenizer("a", "b").input_ids == one + two


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_nothing_is_unknown(tokenizer, text: str) -> None:
    """Byte fallback: any text has ids without <unk>, unless it names the token itself."""
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids or "<unk>" in text


@given(st.lists(st.text(st.sampled_from("abcXYZ .,!?'\"é日😀019"), min_size=1), max_size=8))
@settings(max_examples=100, deadline=None)
def test_decoding_returns_the_text(tokenizer, words: list[str]) -> None:
    """Up to whitespace, which is collapsed as T5 does."""
    text = " ".join(" ".join(words).split())
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="t5-mini"):
        embedded("t5-mimi")


def test_listing_costs_no_transformers() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "import deltatune.core.registry\n"
        "spec = u.find_spec('deltatune')\n"
        "path = spec.submodule_search_locations[0] + '/backbones/ladder.py'\n"
        "s = u.spec_from_file_location('embedded', path); m = u.module_from_spec(s)\n"
        "s.loader.exec_module(m)\n"
        "assert 't5-mini' in m.EMBEDDED and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
