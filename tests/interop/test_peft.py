"""PEFT's folders: what PEFT saves is read as what it computes, and PEFT loads what is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.cases import CASES, CLS, INEXACT, OURS, REFUSED
from tests.interop.folders import Case, loaded, logits, moved, peft

import deltatune as dt
from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.interop import peft as exchange
from deltatune.interop.table import ABSENT, DIALECTS, TABLE
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about names of modules and seeds
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_of_peft_computes_the_same_here_and_there_again(
    case: Case, tmp_path: Path
) -> None:
    wanted = moved(case, tmp_path / "theirs")
    model = FAMILIES[case.family].build()
    before = logits(case.family, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = dt.load(tmp_path / "theirs", model)
    assert delta.name.startswith(case.method)
    assert (before - wanted).abs().max() > 1e-2
    torch.testing.assert_close(logits(case.family, model), wanted, **CLOSE)
    exchange.write(delta, tmp_path / "ours")
    torch.testing.assert_close(
        logits(case.family, loaded(case.family, tmp_path / "ours")), wanted, **CLOSE
    )
    again = exchange.read(tmp_path / "ours", FAMILIES[case.family].build())
    assert again.name == delta.name
    same(delta, again, exact=case.exact)


def same(one: Delta, two: Delta, *, exact: bool = True) -> None:
    assert one.tensors().keys() == two.tensors().keys()
    for name, value in one.tensors().items():
        other = two.tensors()[name]
        torch.testing.assert_close(other, value, **({"rtol": 0, "atol": 0} if exact else CLOSE))


@pytest.mark.parametrize(("method", "family", "kind", "exact"), OURS)
def test_peft_loads_what_is_written(
    method: str, family: str, kind: str, exact: bool, tmp_path: Path
) -> None:
    model = FAMILIES[family].build()
    delta = api.attach(model, method, seed=2)
    move(delta)
    wanted = logits(family, model)
    exchange.write(delta, tmp_path / "ours")
    assert configuration(tmp_path / "ours")["peft_type"] == kind
    torch.testing.assert_close(
        logits(family, loaded(family, tmp_path / "ours")), wanted, rtol=1e-5, atol=1e-5
    )
    back = exchange.read(tmp_path / "ours", FAMILIES[family].build())
    torch.testing.assert_close(logits(family, back.model), wanted, rtol=1e-5, atol=1e-5)
    if exact:
        named = {name.partition("/")[2]: value for name, value in back.tensors().items()}
        for name, value in delta.tensors().items():
            assert torch.equal(named[name.partition("/")[2]], value), name


def configuration(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_one_slot_of_a_bank_is_written(tmp_path: Path) -> None:
    delta = api.attach(FAMILIES["llama"].build(), "lora(rank=2)", slots=3)
    move(delta)
    exchange.write(delta, tmp_path / "one", slot=1)
    back = exchange.read(tmp_path / "one", FAMILIES["llama"].build())
    for name, value in back.tensors().items():
        assert torch.equal(value, delta.tensors(1)[name])


def test_what_was_trained_by_peft_is_read(tmp_path: Path) -> None:
    kin = FAMILIES["bert"]
    model = peft.get_peft_model(kin.build(), Case("bert", "LoraConfig", CLS).configuration)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.arange(4) % 3
    for _ in range(3):
        optimiser.zero_grad()
        model(**kin.batch(), labels=labels).loss.backward()
        optimiser.step()
    model.eval().save_pretrained(tmp_path / "trained")
    mine = kin.build()
    dt.load(tmp_path / "trained", mine)
    torch.testing.assert_close(logits("bert", mine), logits("bert", model), **CLOSE)


def test_where_it_is_from_is_told_and_kept(tmp_path: Path) -> None:
    moved(
        Case("llama", "FourierFTConfig", {"n_frequency": 9, "random_loc_seed": 5}), tmp_path / "a"
    )
    values = {**configuration(tmp_path / "a"), "base_model_name_or_path": "some/backbone"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    model = FAMILIES["llama"].build()
    delta = dt.load(tmp_path / "a", model)
    assert delta.origins[0]["backbone_verified"] is False
    assert delta.origins[0]["configuration"]["base_model_name_or_path"] == "some/backbone"
    dt.save(delta, tmp_path / "kept")
    delta.detach()
    again = dt.load(tmp_path / "kept", model)  # verified from now on: the fingerprint is taken
    assert again.origins == delta.origins
    exchange.write(again, tmp_path / "b")  # the seed of the places is known from the origin
    assert configuration(tmp_path / "b")["random_loc_seed"] == 5
    assert configuration(tmp_path / "b")["base_model_name_or_path"] == "some/backbone"
    again.redraw(0, seed=1)
    assert not again.origins


def test_a_folder_of_both_is_ours(tmp_path: Path) -> None:
    delta = api.attach(FAMILIES["llama"].build(), "lora(rank=2)", seed=1)
    exchange.write(delta, tmp_path / "both")
    for file in dt.save(delta, tmp_path / "mine").iterdir():
        file.rename(tmp_path / "both" / file.name)
    assert 0 in dt.load(tmp_path / "both", FAMILIES["llama"].build()).saved


@pytest.mark.parametrize(("method", "family", "words"), REFUSED)
def test_what_peft_cannot_express_is_refused(
    method: str, family: str, words: str, tmp_path: Path
) -> None:
    delta = api.attach(FAMILIES[family].build(), method)
    move(delta)
    with pytest.raises(ConfigurationError, match=words):
        exchange.write(delta, tmp_path / "refused")
    assert not list(tmp_path.iterdir())
    delta.detach()


def test_projections_of_every_width_are_written_as_lora(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    delta = api.attach(model, "vera(rank=3, at='linear')")
    move(delta)
    exchange.write(delta, tmp_path / "lora", as_lora=True)
    found = logits("llama", loaded("llama", tmp_path / "lora"))
    torch.testing.assert_close(found, logits("llama", model), **CLOSE)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    delta = api.attach(FAMILIES["llama"].build(), "lora(rank=2)")
    exchange.write(delta, tmp_path / "a")
    with pytest.raises(ArtefactError, match="exists"):
        exchange.write(delta, tmp_path / "a")
    with pytest.raises(ConfigurationError, match="no slot 1"):
        exchange.write(delta, tmp_path / "b", slot=1)


def test_every_kind_that_peft_has_is_in_the_table() -> None:
    assert {row.kind for row in TABLE} == {kind.value for kind in peft.PeftType}
    assert not DIALECTS.keys() & ABSENT.keys()
    read = {case.configuration.peft_type.value for case in CASES}
    assert read == set(DIALECTS)
    assert {kind for _, _, kind, _ in OURS} >= {
        kind for kind, one in DIALECTS.items() if one.writes
    } - {"FOURIERFT", "WAVEFT"}  # which are written after they were read


def test_the_page_holds_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
    for row in TABLE:
        reads, writes = (
            ", ".join(f"`{n}`" for n in names) or "–" for names in (row.reads, row.writes)
        )
        assert f"| `{row.kind}` | {reads} | {writes} | {row.note} |" in page, row.kind


@pytest.mark.parametrize("kind", sorted(DIALECTS))
def test_every_key_that_peft_writes_is_known(kind: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    plain = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]().to_dict()
    keys = DIALECTS[kind].keys
    assert plain.keys() <= keys.read.keys() | keys.only.keys() | keys.idle | {"runtime_config"}
    for key, value in keys.read.items():  # where a key is absent, PEFT takes what we take
        if value is not None:
            assert plain[key] == value, key
    for key, values in keys.only.items():
        assert plain.get(key, values[0]) == values[0], key


@pytest.mark.parametrize(("case", "words"), INEXACT, ids=str)
def test_what_is_not_exact_is_refused(case: Case, words: str, tmp_path: Path) -> None:
    moved(case, tmp_path / "theirs")
    with pytest.raises(ArtefactError, match=words):
        dt.load(tmp_path / "theirs", FAMILIES[case.family].build())
