"""Presets, aliases and what does not work: what an expression may name besides methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from deltatune import api
from deltatune.core.artefact import read
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.grammar import Expression, parse
from deltatune.core.method import METHODS
from deltatune.core.presets import ABSENT, PRESETS, Preset
from deltatune.core.registry import Names, Registry
from deltatune.study.comparison import Comparison
from deltatune.testing.families import FAMILIES

BLOCKS = 6


@pytest.fixture(scope="module")
def t5() -> PreTrainedModel:
    """Of six blocks in each stack."""
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=BLOCKS, num_heads=4)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_as_its_methods(name: str, t5: PreTrainedModel) -> None:
    preset = PRESETS[name]
    for text in (name, *preset.aliases):
        assert parse(text) == parse(preset.expression) == Expression.of(text)
        assert parse(f"{text} + full").methods[:-1] == parse(name).methods
    assert name not in {method.name for method in parse(name)}
    assert parse(str(parse(name))) == parse(name)
    assert api.plan(t5, name).trainable > 0
    with pytest.raises(ConfigurationError, match=rf"{name} is a preset, .* takes no arguments"):
        parse(f"{name}(at='ffn')")


def test_the_shorthand_places_a_preset() -> None:
    assert str(parse("mam").at("encoder.attention")) == (
        "prefix(at='encoder.attention', length=30) "
        "+ parallel(at='encoder.attention', bottleneck=512)"
    )


def test_the_groups_of_s4_part_the_blocks(t5: PreTrainedModel) -> None:
    held: dict[str, set[int]] = {}
    for part in api.plan(t5, "s4").sites:
        block = int(part.path.split(".block.")[1].split(".")[0])
        held.setdefault(part.method, set()).add(block)
    assert held == {
        "adapter": {0, 1, 2, 3, 4},
        "prefix": {1, 2, 3, 4, 5},
        "bitfit": {3, 4, 5},
        "lora": {0, 5},
    }
    quarter = api.plan(t5, "last_quarter").sites
    assert {int(site.path.split(".block.")[1].split(".")[0]) for site in quarter} == {4, 5}


def test_what_does_not_work_says_why_and_what_is_near(t5: PreTrainedModel) -> None:
    assert len(ABSENT) == 6
    for name, absent in ABSENT.items():
        for text in (name, f"{name}(rank=3)", f"lora + {name}"):
            with pytest.raises(ConfigurationError, match=f"{name} does not work here: ") as raised:
                parse(text)
            assert absent.reason in str(raised.value) and repr(absent.nearest) in str(raised.value)
        if absent.nearest != "head":  # this T5 has no classifier
            assert api.plan(t5, absent.nearest).trainable > 0


def test_an_alias_is_read_and_the_name_is_written() -> None:
    assert str(parse("houlsby(bottleneck=3) + soft_prompt")) == "adapter(bottleneck=3) + prompt"
    assert METHODS["houlsby"] is METHODS["adapter"] and "houlsby" in METHODS
    assert "houlsby" not in list(METHODS) and METHODS.canonical("houlsby") == "adapter"
    with pytest.raises(UnknownNameError, match="no argument of adapter 'rank'"):
        parse("houlsby(rank=3)")
    with pytest.raises(UnknownNameError, match="Did you mean 'houlsby'"):
        parse("houlsbi")


def test_an_artefact_names_the_methods(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    api.save(api.attach(model, "mam"), tmp_path / "one")
    written = "prefix(length=30) + parallel(bottleneck=512)"
    assert json.loads((tmp_path / "one" / "delta.json").read_text())["method"] == written
    assert read(tmp_path / "one").method == written
    loaded = api.load(tmp_path / "one", FAMILIES["llama"].build())
    assert loaded.name == api.attach(FAMILIES["llama"].build(), written).name


def test_cells_name_the_methods() -> None:
    def comparison(*methods: str) -> Comparison:
        return Comparison(
            backbones=("t5-nano",), tasks=("minimal_pairs",), methods=methods, budget="1 step"
        )

    assert comparison("mam", "houlsby").methods == (
        *("prefix(length=30) + parallel(bottleneck=512)", "adapter"),
    )
    with pytest.raises(ConfigurationError, match="adapter stands twice"):
        comparison("adapter", "houlsby")


class One:
    """An entry."""


class Two:
    """Another."""


def test_a_clash_of_names_is_an_error() -> None:
    names = Names()
    first: Registry[type] = Registry("method", names=names)
    second: Registry[type] = Registry("preset", names=names)
    first.add("one", One, ("uno",))
    for name, aliases in (("one", ()), ("uno", ()), ("two", ("one",)), ("three", ("uno",))):
        with pytest.raises(ConfigurationError, match=r"cannot be found as '(one|uno)': the method"):
            second.add(name, Two, aliases)
    with pytest.raises(ConfigurationError, match="'four' cannot be found as 'uno'"):
        first.add("four", Two, ("uno",))
    with pytest.raises(ConfigurationError, match="cannot be found as 'uno'"):
        first.add("uno", Two)
    assert first["uno"] is One and list(first) == ["one"] and len(first) == 1


def test_no_name_of_a_method_is_taken_twice() -> None:
    for name in ("lora", "houlsby", "coda", "mix_and_match"):
        with pytest.raises(ConfigurationError, match="Choose another name"):
            PRESETS.add(name, Preset(expression="lora", text=""))
    for name in ("mam", "houlsby", "coda"):
        with pytest.raises(ConfigurationError, match="Choose another name"):
            METHODS.add(name, METHODS["bitfit"])
