"""Folders that PEFT writes, and what a model gives with one: what tests of the exchange share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.testing.families import FAMILIES

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")

LINEAR = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "wo"],
}


@dataclass(frozen=True)
class Case:
    """A configuration of PEFT on a family.

    Attributes:
        family: in `deltatune.testing.families`.
        name: of PEFT's class.
        fields: of it; `target_modules` are those of `LINEAR` where none are named.
        method: what it is read as, as far as that is asserted.
        exact: whether our leaves are PEFT's numbers, so that they come back bit for bit.
    """

    family: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    exact: bool = True

    @property
    def configuration(self) -> Any:
        """PEFT's configuration."""
        kind = getattr(peft, self.name)
        fields = dict(self.fields)
        if "target_modules" not in fields and "num_virtual_tokens" not in fields:
            fields["target_modules"] = LINEAR[self.family]
        return kind(**fields)

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.fields.items()]
        return "-".join([self.family, self.name.removesuffix("Config"), *words])[:90]


def moved(case: Case, folder: Path) -> Tensor:
    """Writes the folder of a case whose trained parameters were moved; returns its logits."""
    kin = FAMILIES[case.family]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(kin.build(), case.configuration).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(case.family, model)


def logits(family: str, model: nn.Module) -> Tensor:
    """The logits of a batch, of the text's own positions, padded ones of a decoder set to zero."""
    kin = FAMILIES[family]
    batch = kin.batch()
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    if kin.decoder_only:  # PEFT leaves the positions of a prompt in front
        width = batch["input_ids"].shape[1]
        found = found[:, -width:] * batch["attention_mask"][..., None]
    return found


def loaded(family: str, folder: Path) -> Any:
    """A fresh model with a folder, as PEFT loads it."""
    return peft.PeftModel.from_pretrained(FAMILIES[family].build(), str(folder)).eval()
