"""The studies whose reports are kept: each file of benchmarks/studies is one, and can be meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.studies import EXPERIMENT, SETTINGS, STUDIES

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = {path.stem: path for path in (ROOT / "benchmarks" / "studies").glob("*.yaml")}


def test_each_file_is_run() -> None:
    assert {SETTINGS.get(name, name) for name in STUDIES} == {*FILES}


@pytest.mark.parametrize("name", STUDIES)
def test_each_can_be_planned(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, name: str
) -> None:
    texts = tmp_path / "texts.jsonl"
    file, out = FILES[SETTINGS.get(name, name)], ("--out", str(tmp_path / "run"), "--dry-run")
    words = ["study", EXPERIMENT.get(name, name), "--config", str(file), *out]
    if name == "forgetting":
        words += ["--set", f"options.general_text={texts}"]
        assert call(*words)[::2] == (
            2,
            f"deltatune: Cannot read {texts}: No such file or directory.\n",
        )
    texts.write_text('{"text": "of no task"}\n')
    code, said, _ = call(*words)
    assert code == 0 and "to choose learning rates" in said
