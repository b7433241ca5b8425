"""Folders that nobody should trust: each is read as PEFT reads it, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.interop.folders import Case, moved
from transformers import PreTrainedModel

import deltatune as dt
from deltatune.core.delta import deltas_of
from deltatune.core.errors import ArtefactError
from deltatune.interop import folder as folders
from deltatune.interop import peft as exchange
from deltatune.testing.case import marks
from deltatune.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about names of modules and seeds

LM = {"task_type": "CAUSAL_LM"}
CASES = {
    case.name: case
    for case in (
        Case("llama", "LoraConfig", {"r": 3, "modules_to_save": ["lm_head"]}),
        Case("llama", "LoKrConfig", {"r": 2}),
        Case("llama", "VeraConfig", {"r": 4}),
        Case("llama", "RandLoraConfig", {"r": 8}),
        Case("llama", "VBLoRAConfig", {"r": 2, "num_vectors": 5, "vector_length": 8}),
        Case("llama", "FourierFTConfig", {"n_frequency": 9}),
        Case("llama", "ShiraConfig", {"r": 1}),
        Case("llama", "OFTConfig", {"oft_block_size": 8, "r": 0, "use_cayley_neumann": False}),
        Case("llama", "IA3Config", {"feedforward_modules": ["down_proj"]}),
        Case("llama", "LNTuningConfig", {"target_modules": ["norm"]}),
        Case("llama", "TrainableTokensConfig", {"token_indices": [3], "target_modules": None}),
        Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 2, **LM}),
        Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 2, **LM}),
    )
}
LORA = "LoraConfig"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each case, as PEFT writes it."""
    place = tmp_path_factory.mktemp("sound")
    for name, case in CASES.items():
        moved(case, place / name)
    return place


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"].build()


def changed(source: Path, place: Path, values: Any = None, tensors: Any = None) -> Path:
    """A copy of a folder with other values, or with other tensors."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    if values is not None:
        held = json.loads((place / folders.CONFIGURATION).read_text())
        (place / folders.CONFIGURATION).write_text(json.dumps({**held, **values}))
    if tensors is not None:
        held = load_file(place / folders.TENSORS) | tensors
        kept = {name: value for name, value in held.items() if value is not None}
        save_file(kept, place / folders.TENSORS)
    return place


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it no tensor of a file may be read, and no leaf drawn."""
    with monkeypatch.context() as patched:
        patched.setattr(folders.Header, "read", lambda *_: pytest.fail("a tensor was read"))
        patched.setattr(exchange, "adopt", lambda *_, **__: pytest.fail("a leaf was drawn"))
        yield


SHAPES: list[tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = [
    ({}, {A: None}, "needs .*lora_A.weight of shape \\(3, 32\\), which is missing"),
    ({}, {"base_model.model.x.lora_A.weight": torch.ones(2)}, "belongs to nothing"),
    ({}, {"../../../etc/passwd": torch.ones(2)}, "belongs to nothing"),
    ({}, {"base_model.model.model.layers.0.self_attn.q_proj": torch.ones(2)}, "belongs to nothing"),
    ({}, {A: torch.ones(4, 32)}, "has the shape \\(4, 32\\)"),
    ({}, {A: torch.ones(())}, "has the shape \\(\\)"),
    ({"r": 16}, {}, "needs \\(16, "),
    ({"r": 10**9}, {}, "adds nothing to 32"),
    ({"r": 10**40}, {}, "r must be a number that a method can have"),
    ({"r": "8"}, {}, "rank must be int"),
    ({"rank_pattern": {"(": 3}}, {}, "no regular expression"),
    ({"rank_pattern": {"q_proj": "3"}}, {}, "numbers by names"),
    ({"target_modules": "("}, {}, "no regular expression"),
    ({"target_modules": ["gone"]}, {}, "names no module of Llama"),
    ({"target_modules": "all-linear"}, {}, "what PEFT saves"),
    ({"target_modules": [["q_proj"]]}, {}, "a list of texts"),
    ({"target_modules": ["q_proj"]}, {}, "down_proj.lora_A.weight .*belongs to nothing"),
    ({"target_modules": ["embed_tokens"]}, {}, "an Embedding|a Embedding"),
    ({"lora_alpha": float("nan")}, {}, "alpha must be finite"),
    ({"modules_to_save": ["lm_head", "model.norm"]}, {}, "needs .*norm.weight"),
    ({"modules_to_save": None}, {}, "lm_head.weight .*belongs to nothing"),
    ({"peft_type": "LORE"}, {}, "no peft_type of PEFT 0.21. Did you mean LORA"),
    ({"peft_type": ["LORA"]}, {}, "no peft_type"),
    ({"peft_type": "XLORA"}, {}, "XLORA is not read"),
    ({"task_type": "COFFEE"}, {}, "task_type must be null or one of CAUSAL_LM"),
    ({"task_type": {}}, {}, "task_type must be null"),
    ({"use_qalora": True}, {}, "use_qalora=True has no counterpart"),
    ({"lora_magic": 1, "b": 2}, {}, "the keys b, lora_magic may change what is computed"),
    ({"init_lora_weights": "loftq"}, {}, "changed the backbone"),
    ({"init_lora_weights": "nonsense"}, {}, "init_lora_weights must be"),
]


@pytest.mark.parametrize(("values", "tensors", "words"), SHAPES, ids=lambda one: str(one)[:60])
def test_what_does_not_fit_is_refused_before_a_tensor_is_read(
    values: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
    words: str,
    sound: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = marks(model)
    bad = changed(sound / LORA, tmp_path / "bad", values, tensors or None)
    with unread(monkeypatch), pytest.raises(ArtefactError, match=words):
        dt.load(bad, model)
    assert marks(model) == before


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("VeraConfig", "r", 2**30),
        ("VBLoRAConfig", "num_vectors", 2**30),
        ("PromptTuningConfig", "num_virtual_tokens", 2**30),
        ("PromptTuningConfig", "num_virtual_tokens", 10**30),
        ("PrefixTuningConfig", "num_virtual_tokens", 2**40),
        ("FourierFTConfig", "n_frequency", 2**30),
        ("ShiraConfig", "r", 2**30),
        ("OFTConfig", "oft_block_size", 2**30),
        ("TrainableTokensConfig", "token_indices", [2**40]),
        ("TrainableTokensConfig", "token_indices", []),
    ],
)
def test_a_small_file_cannot_ask_for_a_large_tensor(
    name: str,
    key: str,
    value: object,
    sound: Path,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = changed(sound / name, tmp_path / "bad", {key: value})
    with unread(monkeypatch), pytest.raises(ArtefactError):
        dt.load(bad, model)


def test_values_that_cannot_be_meant_are_refused(
    sound: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    for value, words in (
        (torch.full((3, 32), torch.nan), "not finite"),
        (torch.ones(3, 32, dtype=torch.int32), "of type I32"),
        (torch.ones(3, 32, dtype=torch.bool), "of type BOOL"),
    ):
        bad = changed(sound / LORA, tmp_path / "bad", tensors={A: value})
        with pytest.raises(ArtefactError, match=words):
            dt.load(bad, model)
    ending = "model.layers.0.self_attn.q_proj.shira_indices"
    outside = torch.full((2, 64), 99, dtype=torch.int32)
    bad = changed(
        sound / "ShiraConfig", tmp_path / "bad", tensors={f"base_model.model.{ending}": outside}
    )
    with pytest.raises(ArtefactError, match="outside of its weight"):
        dt.load(bad, model)
    half = {n: v.bfloat16() for n, v in load_file(sound / LORA / folders.TENSORS).items()}
    delta = dt.load(changed(sound / LORA, tmp_path / "half", tensors=half), model)
    found = delta.tensors()["lora/model.layers.0.self_attn.q_proj/A"]
    assert torch.equal(found, half[A].float())  # wider numbers lose nothing
    delta.detach()


def test_files_are_needed_whole_and_not_pickled(
    sound: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    bad = changed(sound / LORA, tmp_path / "bad")
    (bad / folders.TENSORS).rename(bad / "adapter_model.bin")
    with pytest.raises(ArtefactError, match=r"adapter_model.bin alone, a pickle, which runs code"):
        dt.load(bad, model)
    (bad / "adapter_model.bin").unlink()
    with pytest.raises(ArtefactError, match=r"adapter_model.safetensors is missing"):
        dt.load(bad, model)
    whole = (sound / LORA / folders.TENSORS).read_bytes()
    for content in (b"", whole[:7], whole[:-8], b"\xff" * 64):
        (bad / folders.TENSORS).write_bytes(content)
        with pytest.raises(ArtefactError, match="cannot be read"):
            dt.load(bad, model)
    for text in ("", "[]", "{", "[" * 100_000, "\x00", '{"peft_type": "LORA"}'):
        (bad / folders.CONFIGURATION).write_text(text)
        with pytest.raises(ArtefactError):
            dt.load(bad, model)
    (bad / folders.CONFIGURATION).write_text(" " * (5 << 20))
    with pytest.raises(ArtefactError, match="more than"):
        dt.load(bad, model)
    (bad / folders.CONFIGURATION).unlink()
    with pytest.raises(ArtefactError, match=r"delta.json is missing"):
        dt.load(bad, model)
    with pytest.raises(ArtefactError, match=r"adapter_config.json is missing"):
        exchange.read(bad, model)


NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 10**30, -(10**30), 1.5, 1e308, float("inf"))
TEXTS = ("", "q_proj", "(", "..", "*", "a|b", "\0", "é", "LORA", "lm_head", "layers", "road_4")
LISTS = ([], [None], ["q_proj"], ["("], [1], [[1]], ["lm_head"], ["", "norm"])
PATTERNS = ({}, {"q_proj": 3}, {"(": 3}, {"q_proj": 10**30}, {"q_proj": "x"}, {"a": {}})
VALUES = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *LISTS, *PATTERNS])


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data(), st.sampled_from(sorted(CASES)))
def test_any_folder_is_read_or_refused(
    sound: Path, model: PreTrainedModel, tmp_path: Path, data: st.DataObject, name: str
) -> None:
    """One or two things in a sound folder are others; nothing but an ArtefactError comes of it."""
    keys = sorted(json.loads((sound / name / folders.CONFIGURATION).read_text()))
    values = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=2))
    names = sorted(load_file(sound / name / folders.TENSORS))
    shapes = st.sampled_from([None, (), (1,), (3, 32), (32, 3), (2, 2, 2)])
    kinds = st.sampled_from([torch.float32, torch.float16, torch.int32, torch.int64, torch.bool])
    wrong = data.draw(
        st.dictionaries(st.sampled_from([*names, "..", ""]), st.tuples(shapes, kinds), max_size=1)
    )
    tensors = {
        key: None if shape is None else torch.ones(shape, dtype=kind)
        for key, (shape, kind) in wrong.items()
    }
    bad = changed(sound / name, tmp_path / "bad", values, tensors or None)
    try:
        dt.load(bad, model).detach()
    except ArtefactError as error:
        assert len(str(error)) > 20
    assert not deltas_of(model)
