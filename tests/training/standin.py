"""A stand-in for the kernel's run: a frozen embedding with dropout, and a small trained part."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltatune.core.policy import Policies
from deltatune.training import Settings

WORDS, WIDTH, CLASSES = 12, 6, 3


@dataclass(frozen=True)
class Row:
    input_ids: tuple[int, ...]
    labels: int


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows whose label follows from their first word, so that there is something to learn."""
    draw = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for _ in range(count):
        words = draw.integers(1, WORDS, size=int(draw.integers(1, 9))).tolist()
        rows.append(Row(tuple(words), words[0] % CLASSES))
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    padded = [list(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows]
    ids = torch.tensor(padded)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([row.labels for row in rows]),
    }


class StandIn(nn.Module):
    """Kills its own process before forward pass `kill_at`; `width` is that of the trained part."""

    def __init__(self, kill_at: int | None = None, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.base = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Dropout(dropout))
            self.base.requires_grad_(False)
            self.hidden, self.head = nn.Linear(WIDTH, width), nn.Linear(width, CLASSES)
        self.base_dropout = False
        self.kill_at, self.steps, self.poisoned = kill_at, list[int](), -1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        mask = attention_mask.unsqueeze(-1)
        pooled = (self.base(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(torch.tanh(self.hidden(pooled)))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.steps[-1:] == [self.poisoned]:
            loss = loss * float("nan")
        return SimpleNamespace(loss=loss, logits=logits)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        parameters = self._trained()
        decayed = [p for name, p in parameters.items() if name.endswith("weight")]
        others = [p for name, p in parameters.items() if not name.endswith("weight")]
        return [
            {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay, "slot": 0},
            {"params": others, "lr": learning_rate, "weight_decay": 0.0, "slot": 0},
        ]

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trained().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained().items():
            parameter.data.copy_(state[name])

    def penalty(self) -> None:
        return None

    def policies(self) -> Policies:
        return Policies(SimpleNamespace(trained_parts=()), ())  # type: ignore[arg-type]

    def surveys(self) -> tuple[()]:
        return ()

    def set_step(self, step: int) -> None:
        self.steps.append(step)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self, mode: bool = True) -> StandIn:
        super().train(mode)
        self.base.train(mode and self.base_dropout)
        return self


def accuracy(run: StandIn, rows: Sequence[Row]) -> float:
    with torch.no_grad():
        run.steps.append(-2)
        batch = collate(rows)
        return float((run(**batch).logits.argmax(-1) == batch["labels"]).float().mean())


def quick(**values: Any) -> Settings:
    """Settings for a small, fast run."""
    return Settings(
        **{
            "learning_rate": 0.02,
            "per_device_batch_size": 4,
            "checkpoint_every": 3,
            "base_dropout": True,
            **values,
        }
    )


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of a log without times and memory, of some kinds or of all."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.startswith("peak_")}
        for line in lines
        if not kinds or line["event"] in kinds
    ]
