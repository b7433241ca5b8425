"""Row 10: a training step whose trunk is read from a cache, against the same step without one.

BERT of the base shape with a classifier, in fp32, 16 rows of 64 tokens, from the second epoch on;
whole steps, from the choice of rows to AdamW. Both must give the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness import Row, Size, Work, interleave, row
from benchmarks.steps import ids
from deltatune import api
from deltatune.core.run import Run
from deltatune.training import Settings, Steps, TrunkCache
from deltatune.training.loop import begin
from deltatune.training.progress import SilentProgress
from deltatune.training.state import RunState
from deltatune.training.step import StepTaker

__all__ = ["rows"]

EXAMPLES, LENGTH, BATCHES = 16, 64, 4
SETTINGS = Settings(learning_rate=1e-3, schedule="constant", per_device_batch_size=EXAMPLES)


def rows(size: Size) -> Iterator[Row]:
    """Measures row 10."""
    top = "lora(rank=8, at='block[{}:].attention.q | block[{}:].attention.v')"
    for number, (what, method, must) in enumerate(
        (
            ("LoRA q,v in the top 2 blocks", top.format(-2, -2), 3.5),
            ("LoRA q,v in the top block", top.format(-1, -1), 6.0),
            ("a head alone", "head", 100.0),
        ),
        1,
    ):
        metric = f"step of {what}, trunk from the cache, {EXAMPLES} x {LENGTH}, fp32, ms"
        yield _measured(size, method, f"10.{number}", metric, must)


def _measured(size: Size, method: str, id: str, metric: str, must: float) -> Row:
    """A step with and without the cache; both must give the same losses."""
    plain, cached = _training(size.layers, method), _training(size.layers, method)
    contenders: dict[str, Work] = {
        "ours": lambda: cached[0].take(cached[1], 1.0, 0.0),
        "peer": lambda: plain[0].take(plain[1], 1.0, 0.0),
    }
    with ExitStack() as served:
        served.enter_context(
            TrunkCache().serving(cached[0].run, SETTINGS, math.inf, SilentProgress())
        )
        for _ in range(BATCHES):  # the first epoch, which fills the cache
            for step in contenders.values():
                step()
        ms = {name: 1e3 * held for name, held in interleave(contenders, size.rounds).items()}
        found = row(id, metric, ms["ours"], peer=ms["peer"], over="gain", must=must,
                    contenders=contenders)  # fmt: skip
    pairs = zip(plain[1].facts.losses, cached[1].facts.losses, strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    if apart > 1e-6:
        raise RuntimeError(f"The losses of {method} differ by {apart:.2g} with the trunk cache.")
    return found


def _training(layers: int, method: str) -> tuple[StepTaker, RunState]:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    run = Run(api.attach(BertForSequenceClassification(config), method))
    data = ids(EXAMPLES * BATCHES, LENGTH).tolist()
    taker, state, _ = begin(run, data, _collate, SETTINGS, Steps(1000), Accelerator())
    run.train()
    return taker, state


def _collate(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    tokens = torch.tensor(rows)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens[:, 0] % 2,
    }
