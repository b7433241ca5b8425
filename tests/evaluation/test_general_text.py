"""The loss on texts of no task."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune import api
from deltatune.backbones.load import load_backbone
from deltatune.core.errors import DataError, UnsupportedError
from deltatune.evaluation.general_text import cut_out, general_loss, read_texts

SENTINELS = tuple(range(1000, 1100))
TEXTS = (
    "The committee met in the old library, and nobody spoke of the letter.",
    "Two rivers meet north of the town, where the bridge was built in 1840.",
    "She had never seen so much snow, nor so little light.",
)


@given(st.lists(st.integers(0, 900), min_size=2, max_size=200), st.floats(0, 1, exclude_max=True))
def test_what_is_left_and_what_is_cut_are_the_text(ids: list[int], key: float) -> None:
    left, cut = cut_out(ids, SENTINELS, key)
    assert (left, cut) == cut_out(ids, SENTINELS, key)
    spans: dict[int, list[int]] = {}
    for token in cut:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    again = [t for token in left for t in (spans[token] if token in SENTINELS else [token])]
    assert again == ids
    assert sum(map(len, spans.values())) == max(1, round(0.15 * len(ids)))
    assert all(spans.values()), "every span has a token"
    assert list(spans) == list(SENTINELS[: len(spans)])


def test_a_delta_that_is_off_changes_nothing() -> None:
    backbone = load_backbone("t5-nano")
    before = general_loss(backbone, TEXTS)
    assert 1 < before < 9.1, "better than chance over the vocabulary, and no wonder"
    assert general_loss(backbone, TEXTS, batch_size=2) == pytest.approx(before, rel=1e-5)
    delta = api.attach(backbone.model, "bitfit")
    for row in delta.bank.slots:
        row.data.add_(0.1)
    assert abs(general_loss(backbone, TEXTS) - before) > 1e-3
    with delta.active(False):
        assert general_loss(backbone, TEXTS) == before
    delta.detach()


def test_an_encoder_predicts_no_text() -> None:
    encoder = replace(load_backbone("t5-nano"), form="encoder")
    with pytest.raises(UnsupportedError, match="no head that predicts text"):
        general_loss(encoder, TEXTS)


def test_texts_are_read_from_a_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(TEXTS))
    assert read_texts(path, 2) == TEXTS[:2]
    other = tmp_path / "other.jsonl"
    other.write_text('{"line": "x"}\n')
    with pytest.raises(DataError, match="no field 'text'"):
        read_texts(other, 2)
