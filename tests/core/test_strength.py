"""`0.5 * lora`: what a method changes, multiplied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltatune import api
from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import Expression, parse
from deltatune.methods import BitFit, LoRA
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

NUMBERS = st.floats(-8, 8, allow_nan=False).filter(lambda number: abs(number) > 1e-6)


@given(NUMBERS, NUMBERS)
def test_what_is_written_is_what_is_read(one: float, other: float) -> None:
    built = one * (LoRA(rank=2) + BitFit() * other)
    assert [method.strength for method in built] == [one, one * other]
    assert parse(str(built)) == built
    assert parse(f"{one} * (lora(rank=2) + {other} * bitfit)") == built


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("lora - bitfit", "lora + -1.0 * bitfit"),
        ("-lora", "-1.0 * lora"),
        ("1 * lora", "lora"),
        ("2 * (0.5 * lora)", "lora"),
        ("-(lora - 0.5 * adapter)", "-1.0 * lora + 0.5 * adapter"),
        ("0.5 * mam - lora", None),
    ],
)
def test_signs_and_parentheses(text: str, canonical: str | None) -> None:
    if canonical is None:  # the preset has prefixes
        with pytest.raises(ConfigurationError, match="prefix is there or not"):
            parse(text)
    else:
        assert str(parse(text)) == canonical


def test_python_writes_it_the_same_way() -> None:
    lora, bitfit = LoRA(rank=2), BitFit()
    assert lora - bitfit == parse("lora(rank=2) - bitfit")
    assert -(lora + bitfit) == parse("-(lora(rank=2) + bitfit)")
    assert Expression.of(0.5 * lora) == parse("0.5 * lora(rank=2)")


@pytest.mark.parametrize("text", ["prompt", "prefix", "head(labels=2)", "full"])
def test_what_is_there_or_not_has_no_strength(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is there or not"):
        parse(f"0.5 * {text}")


@pytest.mark.parametrize(
    "text", ["0 * lora", "lora * lora", "'2' * lora", "True * lora", "lora / 2"]
)
def test_what_has_no_meaning_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(text)


@pytest.mark.parametrize(
    "method", ["lora(rank=3)", "dora(rank=2)", "oft(block=4)", "bitfit", "ia3"]
)
@pytest.mark.parametrize("strength", [0.5, -1.0, 3.0])
def test_weights_move_by_so_much(method: str, strength: float) -> None:
    """Merged: the difference of every parameter is that of the method alone, multiplied."""
    changes: list[dict[str, Tensor]] = []
    for expression in (method, f"{strength} * {method}"):
        model = FAMILIES["bert"].build()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        delta = api.attach(model, expression)
        move(delta)
        delta.merge()
        changes.append({n: v - before[n] for n, v in model.state_dict().items()})
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], strength * change, rtol=1e-4, atol=1e-6)
    assert any(change.any() for change in changes[0].values())


@pytest.mark.parametrize("method", ["adapter(bottleneck=4)", "parallel(bottleneck=4)"])
def test_outputs_move_by_so_much(method: str) -> None:
    """One adapter with twice the strength is two of the same, where they read the same."""
    model = FAMILIES["bert"].build()
    place = "at='block[-1].ffn'"
    stated = method.replace(")", f", {place})")
    batch = FAMILIES["bert"].batch()
    kept: dict[str, Tensor] = {}

    def keep(module: object, args: object, output: Tensor) -> None:
        kept["y"] = output.detach()

    last = model.bert.encoder.layer[-1].output.dense
    found = []
    for expression in (None, stated, f"2.5 * {stated}"):
        delta = None if expression is None else api.attach(model, expression)
        if delta is not None:
            move(delta)
        hook = last.register_forward_hook(keep)
        with torch.no_grad():
            model(**batch)
        hook.remove()
        found.append(kept["y"])
        if delta is not None:
            delta.detach()
    base, once, more = found
    assert (once - base).abs().max() > 1e-3
    torch.testing.assert_close(more - base, 2.5 * (once - base), rtol=1e-4, atol=1e-5)
