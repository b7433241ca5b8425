"""PEFT's folders: what PEFT saves is read as what it computes, and PEFT loads what is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
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

LM, S2S, CLS = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}, {"task_type": "SEQ_CLS"}
NARROW = {"target_modules": ["q_proj"]}
EXACT_OFT = {"use_cayley_neumann": False}
CASES = [
    *(Case(f, "LoraConfig", {"r": 4, "lora_alpha": 6}) for f in ("llama", "gpt2", "bert", "t5")),
    Case("llama", "LoraConfig", {"r": 3, "lora_alpha": 6, "use_rslora": True}, "rslora("),
    *(Case(f, "LoraConfig", {"r": 3, "use_dora": True}, "dora(") for f in ("llama", "gpt2")),
    Case("t5", "LoraConfig", {"r": 4, "use_dora": True, "use_rslora": True}, "dora("),
    Case(
        "llama",
        "LoraConfig",
        {"r": 4, "rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {"q_proj": 3}},
        "lora(at='0.self_attn.q_proj', rank=4, alpha=3.0) + ",
    ),
    Case("llama", "LoraConfig", {**NARROW, "layers_to_transform": [1]}, "lora(at='1.self_attn.q_"),
    Case(
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "k_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
        },
        "lora(at='0.self_attn.q_proj | 0.self_attn.k_proj'",
    ),
    Case(
        "llama",
        "LoraConfig",
        {"target_modules": r".*(q|v)_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
        "lora(at='v_proj | 1.self_attn.q_proj'",
    ),
    Case("bert", "LoraConfig", {**CLS, "lora_dropout": 0.1}, "lora(at='query | output.dense', dro"),
    Case("roberta", "LoraConfig", {**CLS, "target_modules": ["query"]}),
    Case("llama", "LoraConfig", {**NARROW, "modules_to_save": ["lm_head", "model.norm"]}),
    Case("llama", "LoHaConfig", {"r": 3, "alpha": 6}),
    Case("t5", "LoKrConfig", {"r": 2, "alpha": 6}),
    Case("llama", "LoKrConfig", {"r": 8, "alpha": 6, "decompose_factor": 4}, exact=False),
    Case("gpt2", "HiraConfig", {"r": 3}),
    Case("llama", "GraloraConfig", {"r": 4, "alpha": 8}),
    Case("gpt2", "GraloraConfig", {"r": 4, "alpha": 8}),
    Case("bert", "DeloraConfig", {"r": 3}),
    Case("llama", "MissConfig", {"r": 5}),
    Case("t5", "C3AConfig", {"block_size": 8, "block_size_pattern": {"wo": 4}}),
    *(
        Case("llama", "RoadConfig", {"variant": f"road_{kind}", "group_size": 8})
        for kind in (1, 2, 4)
    ),
    Case("bert", "HRAConfig", {"r": 4, **CLS}),
    Case("llama", "OFTConfig", {"oft_block_size": 4, "r": 0, **EXACT_OFT}),
    Case("llama", "OFTConfig", {"oft_block_size": 0, "r": 8, **EXACT_OFT}),
    Case("t5", "BOFTConfig", {"boft_block_size": 4}),
    Case("bert", "BeftConfig", {}, "bitfit("),
    Case("llama", "ShiraConfig", {"r": 2}),
    Case("llama", "VeraConfig", {"r": 5}),
    Case("gpt2", "VeraConfig", {"r": 5, "save_projection": False, "projection_prng_key": 3}),
    Case("llama", "RandLoraConfig", {"r": 3, "randlora_alpha": 6}),
    Case("gpt2", "RandLoraConfig", {"r": 5, "randlora_alpha": 6}),
    Case("llama", "VBLoRAConfig", {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 3}),
    Case("gpt2", "FourierFTConfig", {"n_frequency": 10, "scaling": 30.0}),
    Case(
        "llama",
        "FourierFTConfig",
        {"n_frequency": 10, "n_frequency_pattern": {"q_proj": 7}, "random_loc_seed": 5},
    ),
    Case("t5", "WaveFTConfig", {"n_frequency": 10}),
    Case(
        "llama",
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    Case("gpt2", "IA3Config", {"feedforward_modules": ["mlp.c_proj"]}),
    Case("bert", "IA3Config", {"feedforward_modules": ["output.dense"], **CLS}),
    Case("t5", "IA3Config", {"feedforward_modules": []}),
    Case("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"], **CLS}, "ln_tuning("),
    Case("llama", "LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    Case("llama", "TrainableTokensConfig", {"token_indices": [3, 9, 4], "target_modules": None}),
    Case("gpt2", "TrainableTokensConfig", {"token_indices": [3, 9], "target_modules": ["wte"]}),
    Case("t5", "TrainableTokensConfig", {"token_indices": [3, 9], "target_modules": ["shared"]}),
    Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 3, **LM}, "prompt(length=3)"),
    Case("t5", "PromptTuningConfig", {"num_virtual_tokens": 3, **S2S}, "prompt(length=3)"),
    Case("gpt2", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8, **LM}),
    Case("t5", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8, **S2S}),
    Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 3, **LM}, exact=False),
    Case("qwen2", "PrefixTuningConfig", {"num_virtual_tokens": 3, **LM}, exact=False),
    Case(
        "llama",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, **LM},
        exact=False,
    ),
]


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


# Ours, the family, and PEFT's kind; whether the leaves come back bit for bit.
OURS = [
    ("lora(rank=3)", "llama", "LORA", True),
    ("lora(rank=3, at='linear') + head(labels=3)", "bert", "LORA", True),
    ("lora(rank=2, at='q_proj') + lora(rank=3, alpha=9.0, at='down_proj')", "llama", "LORA", True),
    ("rslora(rank=3, at='linear')", "t5", "LORA", True),
    ("dora(rank=3, at='c_attn | c_fc')", "gpt2", "LORA", True),
    ("lora(rank=3) + ln_tuning", "t5", "LORA", True),
    ("loha(rank=3)", "t5", "LOHA", True),
    ("lokr(rank=2, alpha=6.0)", "bert", "LOKR", True),
    ("lokr(rank=99, alpha=99.0)", "bert", "LOKR", True),
    ("hira(rank=3, alpha=6.0)", "llama", "HIRA", False),
    ("gralora(rank=4)", "llama", "GRALORA", True),
    ("delora(rank=3)", "t5", "DELORA", True),
    ("miss(rank=5)", "bert", "MISS", True),
    ("c3a(block=8)", "llama", "C3A", True),
    ("road(group=8, variant=4)", "t5", "ROAD", True),
    ("hra(rank=4)", "llama", "HRA", True),
    ("oft(block=4)", "bert", "OFT", True),
    ("boft(block=4)", "llama", "BOFT", True),
    ("bitfit(at='linear')", "bert", "BEFT", True),
    ("shira(rank=2)", "t5", "SHIRA", True),
    ("vera(rank=5, at='q_proj')", "llama", "VERA", True),
    ("randlora(rank=3, alpha=6.0, at='q_proj')", "llama", "RANDLORA", True),
    ("vb_lora(rank=2, vectors=7, block=4)", "llama", "VBLORA", True),
    ("ia3", "llama", "IA3", True),
    ("ia3", "t5", "IA3", True),
    ("ln_tuning + head(labels=3)", "bert", "LN_TUNING", True),
    ("last_layer", "llama", "LN_TUNING", True),
    ("head(labels=3)", "bert", "LN_TUNING", False),
    ("trainable_tokens(tokens='5:8')", "llama", "TRAINABLE_TOKENS", False),
    ("prompt(length=4)", "gpt2", "PROMPT_TUNING", True),
    ("prompt(length=4)", "t5", "PROMPT_TUNING", True),
    ("p_tuning(length=4, middle=8)", "llama", "PROMPT_TUNING", False),
    ("prefix(length=4)", "llama", "PREFIX_TUNING", False),
    ("prefix(length=4, reparameterise=True, middle=8)", "qwen2", "PREFIX_TUNING", False),
    # What is a product of two factors, as LoRA: starts kept beside, slices, sums, strengths.
    ("pissa(rank=3)", "llama", "LORA", False),
    ("lora(rank=16, at='k_proj') + pissa(rank=12, at='k_proj | up_proj')", "llama", "LORA", False),
    ("lora(rank=16, at='up_proj') + pissa(rank=12, at='up_proj')", "llama", "LORA", False),
    ("lora_plus(rank=3)", "t5", "LORA", False),
    ("poly(rank=2, experts=3)", "bert", "LORA", False),
    ("adalora(rank=3, final_rank=2)", "llama", "LORA", False),
    ("lora(rank=3, at='attention.q | attention.v')", "gpt2", "LORA", False),
    ("lora(rank=2, at='q_proj') + rslora(rank=3, at='q_proj')", "llama", "LORA", False),
    ("0.5 * lora(rank=3)", "llama", "LORA", False),
]


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


REFUSED = [
    ("adapter", "bert", "There is no nearest"),
    ("bitfit", "bert", "BEFT at linear modules alone"),
    ("lora + bitfit", "bert", "holds one kind.*as_delta"),
    ("dora + lora(at='ffn')", "llama", "DoRA or not"),
    ("dora(rank=2)", "gpt2", "a part of .*c_attn"),
    ("hra(rank=2)", "gpt2", "takes the fused module whole"),
    ("hra(rank=2, at='c_attn')", "gpt2", "a Conv1D"),
    ("0.5 * loha(rank=2)", "llama", "0.5 \\* loha.*as_delta"),
    ("boft(block=2, depth=2)", "llama", "none is boft"),
    ("vera(rank=3, at='linear')", "llama", "each width has its own.*as_lora"),
    ("fourierft(frequencies=9)", "llama", "a seed that draws them"),
    ("oft(block=4, at='q_proj') + oft(block=8, at='v_proj')", "llama", "one oft_block_size"),
    ("hra(rank=2, at='q_proj') + hra(rank=2, at='q_proj')", "llama", "HRA twice"),
    ("prompt(length=2)", "bert", "read by its classifier"),
    ("prefix(length=2)", "gpt2", "other positions"),
    ("prefix(length=2, at='block[0].attention')", "llama", "one for every block"),
    ("last_layer(at='embedding')", "gpt2", "shares its parameters"),
    ("full", "llama", "holds one kind"),
    ("prompt(length=2) + ln_tuning(at='model.norm')", "llama", "modules_to_save must be null"),
]


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


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("t5", "PrefixTuningConfig", {"num_virtual_tokens": 3, **S2S}), "other positions"),
        (Case("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 3, **LM}), "other positions"),
        (Case("bert", "PromptTuningConfig", {"num_virtual_tokens": 3, **CLS}), "classifier reads"),
        (
            Case("llama", "OFTConfig", {"oft_block_size": 4, "r": 0}),
            "use_cayley_neumann must be false",
        ),
        (Case("llama", "LoraConfig", {"bias": "lora_only"}), "bias='lora_only'"),
        (Case("llama", "LoraConfig", {"init_lora_weights": "pissa"}), "Convert it with PEFT"),
        (Case("llama", "LoraConfig", {"target_modules": ["embed_tokens"]}), "Embedding"),
        (Case("llama", "MissConfig", {"r": 8, "init_weights": "bat"}), "init_weights='bat'"),
        (Case("gpt2", "LoraConfig", {"modules_to_save": ["wte"]}), "shares its parameters"),
        (Case("llama", "AdaLoraConfig", {"total_step": 9}), "ADALORA is not read: PEFT divides"),
        (Case("llama", "LoraConfig", {"trainable_token_indices": [3]}), "trainable_token_indices"),
        (
            Case(
                "llama",
                "VBLoRAConfig",
                {"r": 2, "num_vectors": 9, "vector_length": 4, "save_only_topk_weights": True},
            ),
            "save_only_topk_weights=True",
        ),
    ],
    ids=str,
)
def test_what_is_not_exact_is_refused(case: Case, words: str, tmp_path: Path) -> None:
    moved(case, tmp_path / "theirs")
    with pytest.raises(ArtefactError, match=words):
        dt.load(tmp_path / "theirs", FAMILIES[case.family].build())
