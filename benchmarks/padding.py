"""Row 15: a training step on rows of SST-2-like lengths, padded, cut by length, and packed.

BERT of the base shape with 4 layers, a new classifier, LoRA on q and v. Lengths are the quantiles
of a lognormal distribution with mean 25, at most 128, in random order: batches of 16, each padded
to its longest as `Trainer` does, compute about 2.6 times the real tokens. All contenders take the
same steps over the same 64 rows, with the same model and delta, through `fit`'s own step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness import Row, Size, Work, interleave, row
from deltatune import api
from deltatune.core.run import Run
from deltatune.training import Settings, Steps
from deltatune.training.loop import begin

__all__ = ["rows"]

MEAN, SPREAD, LONGEST, COUNT = 25, 0.6, 128, 64
Example = dict[str, Any]


def rows(size: Size) -> Iterator[Row]:
    """Measures row 15: steps of four batches of 16 rows, then steps of one."""
    data, number = _examples(), 0
    real = sum(len(one["input_ids"]) for one in data)
    for accumulation in (4, 1):
        runs: dict[str, dict[str, Any]] = {
            "padded": {},
            "cut by length": {"tokens_per_pass": 256},
            "packed": {"packing": True, "tokens_per_pass": 2048},
        }
        works, tokens = {}, {}
        for name, changed in runs.items():
            settings = Settings(
                learning_rate=1e-4, schedule="constant", accumulation=accumulation, **changed
            )
            works[name], tokens[name] = _steps(size, data, settings)
        steps = COUNT // (16 * accumulation)
        ms = {n: 1e3 * held / steps for n, held in interleave(works, size.rounds).items()}
        for name, must in (("cut by length", 1.6), ("packed", 2.3)):
            number += 1
            metric = (
                f"step of {16 * accumulation} rows of SST-2-like lengths, {name}, ms; tokens "
                f"computed over real ones {tokens[name] / real:.2f}, padded "
                f"{tokens['padded'] / real:.2f}"
            )
            yield row(f"15.{number}", metric, ms[name], peer=ms["padded"], over="gain", must=must)


def _examples() -> list[Example]:
    draw = np.random.Generator(np.random.PCG64(0))
    normal = NormalDist(math.log(MEAN) - SPREAD**2 / 2, SPREAD)
    quantiles = [math.exp(normal.inv_cdf((k + 0.5) / COUNT)) for k in range(COUNT)]
    lengths = [min(LONGEST, round(length)) for length in quantiles]
    return [
        {"input_ids": draw.integers(1000, 30000, length).tolist(), "labels": length % 2}
        for length in lengths
    ]


def _collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    ids = [torch.tensor(one["input_ids"]) for one in examples]
    masks = [torch.ones_like(one) for one in ids]
    padded = [nn.utils.rnn.pad_sequence(held, batch_first=True) for held in (ids, masks)]
    labels = torch.tensor([one["labels"] for one in examples])
    return {"input_ids": padded[0], "attention_mask": padded[1], "labels": labels}


def _steps(size: Size, data: Sequence[Example], settings: Settings) -> tuple[Work, int]:
    """Steps over all of the data, and how many tokens they compute."""
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=min(size.layers, 4),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    run = Run(api.attach(model.to(size.dtype), "lora(rank=8)"))
    taker, state, _ = begin(run, data, _collate, settings, Steps(10**6), Accelerator(cpu=True))
    run.train()
    counted: list[int] = []

    def epoch() -> None:
        state.sampler.restore(0, 0)  # the same rows in every round
        for _ in range(state.sampler.batches_per_epoch):
            taker.take(state, 1.0, 0.0)

    words = model.bert.embeddings.word_embeddings
    counting = words.register_forward_hook(lambda _, args, __: counted.append(args[0].numel()))
    epoch()
    counting.remove()
    return epoch, sum(counted)
