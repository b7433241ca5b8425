"""Folders of AdapterHub and OpenDelta: each computes what its peer computes, or is refused."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.interop.peers import CLOSE, PEERS, REFUSALS, backbone, logits, names, read, unpacked

import deltatune as dt
from deltatune.core.delta import deltas_of
from deltatune.core.errors import ArtefactError
from deltatune.interop import adapterhub, folder, opendelta, pickled
from deltatune.interop.table import HUB_TABLE, OPEN_TABLE
from deltatune.testing.case import marks

EVERY = [(peer, *case) for peer in PEERS for case in names(peer)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize(("peer", "family", "name"), EVERY)
def test_a_folder_computes_what_its_peer_does_or_is_refused(
    peer: str, family: str, name: str, place: Path
) -> None:
    found = read(place, peer, family, name)
    words = REFUSALS.get((peer, family, name))
    if words is not None:
        assert words in found.reason
        return
    assert found.difference is not None, found.reason
    assert found.difference < CLOSE < 1e-2 < found.moved


def test_no_refusal_is_of_nothing() -> None:
    assert REFUSALS.keys() <= set(EVERY)


def test_the_llama_of_adapterhub_is_another(place: Path) -> None:
    held = load_file(place / "adapterhub" / "llama.safetensors")
    mine = logits(place, "adapterhub", "llama", backbone(place, "llama"))
    theirs = held["nothing_added"] * held["attention_mask"][..., None]
    assert (mine - theirs).abs().max() > 0.5


@pytest.mark.parametrize(("peer", "table"), [("adapterhub", HUB_TABLE), ("opendelta", OPEN_TABLE)])
def test_the_tables_say_what_is_read(peer: str, table: Any, place: Path) -> None:
    """A kind that is read is read in one case at least, as what the table says, and no other is."""
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
    for row in table:
        reads = ", ".join(f"`{name}`" for name in row.reads) or "–"
        assert f"| `{row.kind}` | {reads} | {row.note} |" in page, row.kind
        families = [family for family, name in names(peer) if name == row.kind]
        read_ones = [f for f in families if (peer, f, row.kind) not in REFUSALS]
        assert bool(read_ones) == bool(row.reads), row.kind
        for family in read_ones:
            found = read(place, peer, family, row.kind).name
            assert {one.split("(")[0] for one in found.split(" + ")} <= set(row.reads), found


@pytest.mark.parametrize("peer", PEERS)
def test_the_page_of_parity_has_every_case_and_no_cell_that_differs(peer: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "results" / "parity.md"
    text = page.read_text(encoding="utf-8")
    title = {"adapterhub": "## Folders of AdapterHub", "opendelta": "## Folders of OpenDelta"}[peer]
    rows = text.split(title)[1].split("\n## ")[0].splitlines()
    head = next(row for row in rows if row.startswith("| case |")).split(" | ")
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in rows if row[:2] == "| "}
    for family, name in names(peer):
        cell = cells[name][[one.strip("| ") for one in head].index(family)].strip("| ")
        refused = (peer, family, name) in REFUSALS
        assert cell.startswith("refused: ") if refused else float(cell) < CLOSE, (family, name)
    assert "**" not in text


def test_where_it_is_from_is_told_and_kept(place: Path, tmp_path: Path) -> None:
    model = backbone(place, "bert")
    delta = dt.load(place / "adapterhub" / "bert" / "lora", model)
    assert delta.origins[0]["library"] == "adapters"
    assert delta.origins[0]["backbone_verified"] is False
    assert delta.origins[0]["configuration"]["model_name"] == "backbones/bert"
    before = logits(place, "adapterhub", "bert", model)
    dt.save(delta, tmp_path / "ours")
    delta.detach()
    dt.load(tmp_path / "ours", model)
    assert torch.equal(logits(place, "adapterhub", "bert", model), before)


@pytest.mark.parametrize(
    "source", ["adapterhub/bert/pickled", "opendelta/bert/lora"], ids=["hub", "open"]
)
def test_a_pickle_is_read_only_where_it_is_asked_for(
    source: str, place: Path, tmp_path: Path
) -> None:
    model = backbone(place, "bert")
    with pytest.raises(ArtefactError, match="allow_pickle=True"):
        dt.load(place / source, model)
    assert not deltas_of(model)
    bad = tmp_path / "bad"
    shutil.copytree(place / source, bad)
    file = next(bad.glob("*.bin"))
    whole = file.read_bytes()
    for content, words in hostile(whole):
        file.write_bytes(content)
        with pytest.raises(ArtefactError, match=words):
            dt.load(bad, model, allow_pickle=True)
    assert not deltas_of(model)


class Trap:
    """What a pickle would call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def hostile(whole: bytes) -> Iterator[tuple[bytes, str]]:
    """Files that are no pickle of tensors as torch writes it, and words of the error."""
    yield b"", "cannot be read"
    yield whole[:-30], "cannot be read"
    yield written({"x": Trap()}), "cannot be read"
    yield written([torch.ones(2)]), "something else than tensors"
    yield written({"x": torch.ones(2), "y": 3}), "something else than tensors"
    yield written({3: torch.ones(2)}), "something else than tensors"
    yield written({"x": torch.ones(2).to_sparse()}), "something else than tensors"
    yield written({"x": torch.ones(2, dtype=torch.complex64)}), "of type torch.complex64"
    yield written({"x": torch.ones(1).expand(2**45)}), "belongs to nothing|needs"
    with zipfile.ZipFile(io.BytesIO(whole)) as old:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
    yield packed.getvalue(), "compressed"


def written(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


LORA = "bert.encoder.layer.0.attention.self.query.loras.own.lora_A"
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, torch.Tensor | None], str]] = [
    ("lora", {}, {}, {LORA: None}, "needs .*lora_A of shape \\(2, 8\\), which is missing"),
    ("lora", {}, {}, {LORA: torch.ones(3, 8)}, "has the shape \\(3, 8\\)"),
    ("lora", {}, {}, {"bert.x": torch.ones(2)}, "belongs to nothing"),
    ("lora", {}, {}, {LORA: torch.full((2, 8), torch.nan)}, "not finite"),
    ("lora", {}, {"r": 16}, {}, "16"),
    ("lora", {}, {"r": 10**30}, {}, "r must be a positive number"),
    ("lora", {}, {"r": "2"}, {}, "r must be a whole number"),
    ("lora", {}, {"magic": 1}, {}, "the key magic may change what is computed"),
    ("lora", {"magic": 1}, {}, {}, "the key magic may change what is computed"),
    ("lora", {}, {"architecture": "lara"}, {}, "'lara' is no architecture"),
    ("lora", {}, {"architecture": ["lora"]}, {}, "no architecture"),
    ("lora", {}, {"attn_matrices": ["q", "z"]}, {}, "attn_matrices must be of"),
    ("lora", {}, {"composition_mode": "sum"}, {}, "composition_mode must be"),
    ("lora", {}, {"leave_out": [0, 1]}, {}, "names no module"),
    ("lora", {"model_type": "roberta"}, {}, {}, "model_type must be 'bert'"),
    ("lora", {"model_type": "gptj"}, {}, {}, "does not know where AdapterHub puts"),
    ("lora", {"model_type": None}, {}, {}, "model_type must be a text"),
    ("lora", {"name": "other"}, {}, {}, "needs .*other"),
    ("lora", {"version": None}, {}, {}, "version must be"),
    ("lora", {"config": None}, {}, {}, "config must be a configuration"),
    ("double_seq_bn", {}, {"reduction_factor": 0}, {}, "reduction_factor must be a positive"),
    ("double_seq_bn", {}, {"reduction_factor": {"0": 4}}, {}, "reduction_factor must be a posit"),
    ("double_seq_bn", {}, {"non_linearity": "leakyrelu"}, {}, "non_linearity must be one of"),
    ("double_seq_bn", {}, {"scaling": 2}, {}, "scaling must be"),
    ("double_seq_bn", {}, {"scaling": [1]}, {}, "scaling must be"),
    ("double_seq_bn", {}, {"inv_adapter": "glow"}, {}, "inv_adapter must be"),
    ("double_seq_bn", {}, {"original_ln_after": False}, {}, "the residual is added once"),
    ("seq_bn", {}, {"residual_before_ln": "post_add"}, {}, "the residual is added once"),
    ("compacter", {}, {"phm_dim": 10**9}, {}, "phm_dim must be"),
    ("loreft", {}, {"r": 9}, {}, "a rank of 9"),
]


@pytest.mark.parametrize(("name", "top", "inner", "tensors", "words"), WRONG)
def test_what_does_not_fit_is_refused(
    name: str,
    top: dict[str, Any],
    inner: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
    words: str,
    place: Path,
    tmp_path: Path,
) -> None:
    model = backbone(place, "bert")
    before = marks(model)
    bad = changed(place / "adapterhub" / "bert" / name, tmp_path / "bad", top, inner, tensors)
    with pytest.raises(ArtefactError, match=words):
        dt.load(bad, model)
    assert marks(model) == before


def changed(
    source: Path, bad: Path, top: Any, inner: Any, tensors: dict[str, torch.Tensor | None]
) -> Path:
    """A copy of a folder with other values or tensors."""
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(source, bad)
    file = bad / folder.CONFIGURATION
    held = {**json.loads(file.read_text()), **top}
    if inner:
        held["config"] = {**held["config"], **inner}
    file.write_text(json.dumps(held))
    if tensors:
        path = bad / "adapter.safetensors"
        kept = {**load_file(path), **tensors}
        save_file({name: value for name, value in kept.items() if value is not None}, path)
    return bad


def test_nothing_is_read_before_it_fits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.Header, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(adapterhub, "adopt", lambda *_, **__: pytest.fail("a leaf was drawn"))
    monkeypatch.setattr(opendelta, "adopt", lambda *_, **__: pytest.fail("a leaf was drawn"))
    source = place / "adapterhub" / "bert" / "double_seq_bn"
    wide = changed(source, tmp_path / "wide", {}, {"reduction_factor": 1e-5}, {})
    with pytest.raises(ArtefactError, match="has the shape"):
        dt.load(wide, backbone(place, "bert"))
    mine = tmp_path / "open"
    shutil.copytree(place / "opendelta" / "bert" / "adapter", mine)
    values = {**json.loads((mine / "config.json").read_text()), "bottleneck_dim": 2**30}
    (mine / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match="has the shape"):
        dt.load(mine, backbone(place, "bert"), allow_pickle=True)


OPEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("bert", "lora", {"lora_r": 3}, "has the shape"),
    ("bert", "lora", {"magic": 3}, "the key magic"),
    ("bert", "lora", {"delta_type": "lara"}, "no delta_type"),
    ("bert", "lora", {"modified_modules": ["attn@.z@"]}, "modified_modules must be of"),
    ("bert", "lora", {"modified_modules": ["[r]("]}, "no regular expression"),
    ("bert", "lora", {"modified_modules": ["gone"]}, "names no module"),
    ("bert", "lora", {"modified_modules": ["attn@"]}, "linear modules alone"),
    ("bert", "lora", {"unfrozen_modules": ["classifier"]}, "needs .*classifier"),
    ("bert", "adapter", {"non_linearity": "leakyrelu"}, "non_linearity must be one of"),
    ("bert", "parallel_ffn", {"modified_modules": ["ff@.w1@"]}, "pairs of names"),
    ("bert", "parallel_ffn", {"modified_modules": ["ff@.w2@", "ff@.w1@"]}, "no sublayer"),
    ("bert", "prefix", {"modified_modules": ["ff@.w1@"]}, "attentions"),
    ("bert", "compacter", {"shared_phm_rule": True}, "shared_phm_rule=True has no counterpart"),
    ("llama", "lora", {"common_structure": True}, "names no module"),
    ("t5", "adapter", {"delta_type": "bitfit", "modified_modules": ["attn@"]}, "has no bias"),
]


@pytest.mark.parametrize(("family", "name", "values", "words"), OPEN)
def test_what_opendelta_says_is_held_to(
    family: str, name: str, values: dict[str, Any], words: str, place: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(place / "opendelta" / family / name, bad)
    held = {**json.loads((bad / "config.json").read_text()), **values}
    if held["delta_type"] == "bitfit":
        held = {key: value for key, value in held.items() if key not in ("bottleneck_dim",)}
        held.pop("non_linearity")
    (bad / "config.json").write_text(json.dumps(held))
    with pytest.raises(ArtefactError, match=words):
        dt.load(bad, backbone(place, family), allow_pickle=True)


def test_a_whole_model_is_no_folder_of_a_peer(place: Path, tmp_path: Path) -> None:
    assert not opendelta.holds(place / "backbones" / "bert")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert not opendelta.holds(tmp_path)
    (tmp_path / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(ArtefactError, match="AdapterFusion"):
        dt.load(tmp_path, backbone(place, "bert"))


NUMBERS = (0, 1, -1, 2, 3, 2**31, 10**30, 1.5, 1e308, float("inf"), True, False, None)
TEXTS = ("", "relu", "learned", "nice", "(", "attn@", "[r](", "\0", "lora", "mlp", "q")
VALUES = st.sampled_from([*NUMBERS, *TEXTS, [], [None], ["q"], ["deltas"], [[1]], {}, {"0": 2}])
KINDS = st.sampled_from(
    [one for one in EVERY if one[1] in ("bert", "gpt2") and one not in REFUSALS]
)


@settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), KINDS)
def test_any_folder_is_read_or_refused(
    place: Path, tmp_path: Path, data: st.DataObject, case: tuple[str, str, str]
) -> None:
    """One or two values in a sound folder are others; nothing but an ArtefactError comes of it."""
    peer, family, name = case
    bad = tmp_path / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(place / peer / family / name, bad)
    file = bad / ("config.json" if peer == "opendelta" else folder.CONFIGURATION)
    held = json.loads(file.read_text())
    inner = held["config"] if peer == "adapterhub" and data.draw(st.booleans()) else held
    inner |= data.draw(st.dictionaries(st.sampled_from(sorted(inner)), VALUES, max_size=2))
    file.write_text(json.dumps(held))
    model = backbone(place, family)
    try:
        dt.load(bad, model, allow_pickle=True).detach()
    except ArtefactError as error:
        assert len(str(error)) > 20
    assert not deltas_of(model)


def test_headers_of_both_kinds_say_the_same(place: Path, tmp_path: Path) -> None:
    safe = folder.Header.of(place / "adapterhub" / "bert" / "lora" / "adapter.safetensors")
    torch.save(safe.values(), tmp_path / "same.bin")
    other = pickled.PickledHeader.of(tmp_path / "same.bin")
    assert dict(other.shapes) == dict(safe.shapes)
    assert dict(other.kinds) == dict(safe.kinds)
    assert all(value.equal(safe.read()[name]) for name, value in other.read().items())
