"""`deltatune export`: each form is written, and computes what the delta did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltatune import api
from deltatune.backbones.load import load_backbone
from deltatune.core.artefact import save
from deltatune.core.delta import Delta
from deltatune.testing.case import move

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Delta, str]:
    delta = api.attach(load_backbone("t5-nano").model, "dora(rank=2, at='encoder.attention.q')")
    move(delta)
    folder = save(delta, tmp_path / "delta", facts={"backbone": "t5-nano"})
    return delta, str(folder)


def logits(delta: Delta | None, model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    return found


def test_a_checkpoint(call: Call, made: tuple[Delta, str], tmp_path: Path) -> None:
    delta, folder = made
    code, out, err = call(
        "export", folder, "--as", "checkpoint", "--out", str(tmp_path / "out"), "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["agreement"] == 1 and said["difference"] < 1e-3 * said["largest"]
    again = load_backbone(str(tmp_path / "out")).model
    torch.testing.assert_close(
        logits(None, again), logits(delta, delta.model), rtol=1e-3, atol=1e-3
    )


def test_a_folder_of_peft_and_a_lora(call: Call, made: tuple[Delta, str], tmp_path: Path) -> None:
    delta, folder = made
    wanted = logits(delta, delta.model)
    delta.detach()
    for form, words in (("peft", ()), ("lora", ("--rank", "64"))):
        place = tmp_path / form
        code, out, err = call("export", folder, "--as", form, "--out", str(place), *words)
        assert code == 0 and f"{form}: {place}" in out, err
        assert ("left out of the change" in out) == (form == "lora")
        again = api.load(place, delta.model)
        tolerance = 1e-4 if form == "peft" else 0.05
        torch.testing.assert_close(
            logits(again, delta.model), wanted, rtol=tolerance, atol=tolerance
        )
        again.detach()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--as", "gguf"), "There is no form 'gguf'"),
        (("--as", "peft", "--rank", "2"), "--rank is of --as lora"),
        (("--as", "peft", "--backbone", "t5-micro"), "another architecture"),
    ],
)
def test_a_mistake_is_one_line(
    call: Call, made: tuple[Delta, str], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = call("export", made[1], "--out", str(tmp_path / "out"), *words)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_delta_that_names_no_backbone(
    call: Call, made: tuple[Delta, str], tmp_path: Path
) -> None:
    folder = str(api.save(made[0], tmp_path / "unnamed"))
    words = ("export", folder, "--as", "peft", "--out", str(tmp_path / "out"))
    code, _, err = call(*words)
    assert code == 2 and "Give --backbone" in err
    assert call(*words, "--backbone", "t5-nano")[0] == 0
