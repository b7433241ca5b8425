"""Rows 7 to 9: a step of K runs over one base, against K steps one after the other.

BERT of the base shape, whole steps with AdamW, K different deltas, K optimisers. PEFT is the peer
for LoRA and prefixes; it has neither adapters nor BitFit, for which a plain module stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.harness import Row, Size, Work, interleave, row
from benchmarks.steps import backward, base, floor, ids, loss, peer
from deltatune import api
from deltatune.testing.case import move
from deltatune.training.budget import Steps
from deltatune.training.many import Job, fit_many
from deltatune.training.settings import Settings

__all__ = ["rows", "together"]

SHAPES = ((16, 4, 32, 3.0, 3.6), (8, 8, 64, 1.8, 1.95), (8, 8, 128, 2.2, 2.4))
BOTTLENECK, TOKENS = 64, 20


def rows(size: Size) -> Iterator[Row]:
    """Measures rows 7 to 9."""
    small = replace(size, layers=min(size.layers, 4))
    yield from _shapes(small)
    yield from _lengths(size)
    yield from _others(small)


def _shapes(size: Size) -> Iterator[Row]:
    shapes = SHAPES if size.name == "full" else SHAPES[:1]
    for number, (runs, examples, length, must, stretch) in enumerate(shapes, 1):
        contenders = {
            "ours": together(base(size.layers, size.dtype), "lora(rank=8)", runs, examples, length),
            "peer": _in_turn(peer(size, size.dtype, "qv", 0.0), runs, examples, length),
            "floor": backward(floor(size, size.dtype), ids(runs * examples, length)),
        }
        times = interleave(contenders, size.rounds)
        ms = {name: 1e3 * held for name, held in times.items()}
        yield row(f"7.{number}", f"step of {runs} LoRA q,v runs of {examples} x {length}, ms",
                  ms["ours"], peer=ms["peer"], floor=ms["floor"], over="gain", must=must,
                  stretch=stretch, contenders=contenders)  # fmt: skip


def _lengths(size: Size) -> Iterator[Row]:
    """8 runs of 8 rows, as long as those of MNLI, each run's padded to its longest by the peer.

    The floor is the base on all of the rows, sorted by length and 8 at a time.
    """
    data = [_rows(run) for run in range(8)]
    contenders = {
        "ours": _fitted(size, data),
        "peer": _padded(peer(size, size.dtype, "qv", 0.0), data),
        "peer in fp32": _padded(peer(size, torch.float32, "qv", 0.0), data),
        "floor": _sorted(floor(size, size.dtype), data),
    }
    ms = {name: 1e3 * held for name, held in interleave(contenders, size.rounds).items()}
    what = f"step of 8 LoRA q,v runs of 8 rows of mixed lengths, {size.layers} layers, ms"
    yield row("8.1", what, ms["ours"], peer=ms["peer"], floor=ms["floor"], over="gain", must=1.8,
              stretch=2.3, contenders=contenders)  # fmt: skip
    yield row("8.2", "the same against PEFT in fp32, ms", ms["ours"], peer=ms["peer in fp32"],
              floor=ms["floor"], over="gain", must=3.2, stretch=4,
              contenders=contenders)  # fmt: skip


def _others(size: Size) -> Iterator[Row]:
    examples, length = 4, 32
    measured = (
        ("9.1", "adapter", f"adapter(bottleneck={BOTTLENECK})", _plain_adapter(size), 1.8),
        ("9.2", "BitFit", "bitfit", _plain_bitfit(size), 1.6),
        ("9.3", "prefix", f"prefix(length={TOKENS})", _peer_prefix(size), 1.8),
    )
    for number, name, method, model, must in measured:
        contenders = {
            "ours": together(base(size.layers, size.dtype), method, 8, examples, length),
            "peer": _in_turn(model, 8, examples, length),
            "floor": backward(floor(size, size.dtype), ids(8 * examples, length)),
        }
        times = interleave(contenders, size.rounds)
        ms = {name: 1e3 * held for name, held in times.items()}
        yield row(number, f"step of 8 {name} runs of {examples} x {length}, ms", ms["ours"],
                  peer=ms["peer"], floor=ms["floor"], over="gain", must=must,
                  contenders=contenders)  # fmt: skip


def together(model: nn.Module, method: str, runs: int, examples: int, length: int) -> Work:
    """A step of so many runs of one method, each with so many rows of so many tokens."""
    bank = api.attach(model, method, slots=runs)
    move(bank)
    optimisers = [torch.optim.AdamW([row], lr=1e-4, fused=True) for row in bank.bank.slots]
    batch = ids(runs * examples, length)
    slots = [slot for slot in range(runs) for _ in range(examples)]

    def step() -> None:
        with bank.route(slots):
            torch.autograd.backward(loss(model, batch) * runs)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()

    return step


def _in_turn(model: Any, runs: int, examples: int, length: int) -> Work:
    """One model serves: what differs between the runs is not what takes time."""
    optimiser = torch.optim.AdamW(model.trained, lr=1e-4, fused=True)
    batch = ids(examples, length)

    def step() -> None:
        for _ in range(runs):
            torch.autograd.backward(loss(model, batch))
            optimiser.step()
            optimiser.zero_grad()

    return step


def _plain_adapter(size: Size) -> nn.Module:
    """Houlsby's bottlenecks behind both sublayers, as one would write them without a library."""
    model: Any = base(size.layers, size.dtype)
    width = model.config.hidden_size
    model.trained = []
    for layer in model.encoder.layer:
        for place in (layer.attention.output, layer.output):
            down = nn.Linear(width, BOTTLENECK, dtype=size.dtype)
            up = nn.Linear(BOTTLENECK, width, dtype=size.dtype)
            model.trained += [*down.parameters(), *up.parameters()]
            place.dense.register_forward_hook(
                lambda _, __, y, down=down, up=up: y + up(functional.gelu(down(y)))
            )
    return model  # type: ignore[no-any-return]


def _plain_bitfit(size: Size) -> nn.Module:
    """Every bias trained where it is."""
    model: Any = base(size.layers, size.dtype)
    model.trained = [held for name, held in model.named_parameters() if name.endswith("bias")]
    for bias in model.trained:
        bias.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def _peer_prefix(size: Size) -> nn.Module:
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=TOKENS, task_type=peft.TaskType.FEATURE_EXTRACTION
    )
    model: Any = peft.get_peft_model(base(size.layers, size.dtype), config)
    model.trained = [p for p in model.parameters() if p.requires_grad]
    return model  # type: ignore[no-any-return]


def _rows(run: int) -> list[dict[str, list[int]]]:
    """8 rows with the spread of MNLI's lengths: lognormal, mean 39, at most 128."""
    random = np.random.default_rng(run)
    lengths = np.clip(random.lognormal(np.log(34.0), 0.52, 8), 8, 128).astype(int)
    return [{"input_ids": random.integers(1000, 30000, n).tolist()} for n in lengths]


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in held], batch_first=True)
        for held in (
            [row["input_ids"] for row in rows],
            [[1] * len(row["input_ids"]) for row in rows],
        )
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(rows)).long()}


def _fitted(size: Size, data: Sequence[Sequence[dict[str, list[int]]]]) -> Work:
    """One step of `fit_many`, all that it does around it included."""
    model = _Classifier(base(size.layers, size.dtype))
    bank = api.attach(model, "lora(rank=8)", slots=len(data))
    settings = Settings(learning_rate=1e-4, per_device_batch_size=8, checkpoint_every=None)
    jobs = [Job(rows, settings, Steps(1)) for rows in data]
    return lambda: fit_many(bank, jobs, _collate)


def _sorted(model: nn.Module, data: Sequence[Sequence[dict[str, list[int]]]]) -> Work:
    """The floor over all rows, 8 of a like length at a time."""
    rows = sorted((row for held in data for row in held), key=lambda row: len(row["input_ids"]))
    passes = [_collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
    classifier = _Classifier(model)

    def step() -> None:
        for inputs in passes:
            classifier(**inputs).loss.backward()

    return step


def _padded(model: Any, data: Sequence[Sequence[dict[str, list[int]]]]) -> Work:
    classifier = _Classifier(model)
    optimiser = torch.optim.AdamW(model.trained, lr=1e-4, fused=True)

    def step() -> None:
        for rows in data:
            classifier(**_collate(rows)).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return step


class _Classifier(nn.Module):
    """Two classes from the mean of the last layer, by fixed weights."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = hidden.float().mean(1)[:, :2]
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
