"""Holds each embedded backbone against the same network with random weights, on real tasks.

Full fine-tuning and LoRA (rank 8 on q and v of every attention, written out here so that the check
leans on nothing it might share a fault with), text to text, the answer generated greedily and
compared as a whole. The rate of each arm is chosen on validation from the same grid for both.

    python scripts/check_pretraining.py --data $DELTATUNE_DATA --models t5-mini --steps 300
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5ForConditionalGeneration

from deltatune.backbones.load import load_backbone


@dataclass(frozen=True)
class Task:
    """How a row of a data folder becomes source and target."""

    template: str
    label: str
    words: tuple[str, ...]


# Words, so that what is learned is the class and not how to spell "DESC" in pieces.
TREC = ("abbreviation", "thing", "description", "person", "place", "number")
TASKS = {
    "glue_sst2": Task("sentence: {sentence}", "label", ("negative", "positive")),
    "ag_news": Task("{text}", "label", ("World", "Sports", "Business", "Sci/Tech")),
    "trec": Task("{text}", "coarse_label", TREC),
    "sms_spam": Task("{sms}", "label", ("ham", "spam")),
}
RATES = {"full": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2)}
LONGEST = 64
ROWS = 16
Pairs = list[tuple[str, str]]


def pairs(folder: Path, task: Task, split: str, most: int) -> Pairs:
    """Reads the first `most` rows of a split as (source, target)."""
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(most), strict=False)]
    return [(task.template.format(**row), task.words[row[task.label]]) for row in rows]


class LoRA(nn.Module):
    """A linear layer with x A^T B^T added, B zero at first; scaled by alpha / rank = 2."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.base(x) + 2.0 * (x @ self.down.T) @ self.up.T
        return y


def trained_parameters(model: PreTrainedModel, arm: str) -> list[nn.Parameter]:
    """Prepares the model for the arm and returns what the optimiser gets."""
    if arm == "full":
        return list(model.parameters())
    model.requires_grad_(False)
    for module in list(model.modules()):
        if type(module).__name__ == "T5Attention":
            module.q, module.v = LoRA(module.q), LoRA(module.v)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inputs_of(tokenizer: PreTrainedTokenizerBase, sources: list[str]) -> dict[str, Tensor]:
    """Pads and truncates sources to (rows, length)."""
    found = tokenizer(
        sources, return_tensors="pt", padding=True, truncation=True, max_length=LONGEST
    )
    return {key: found[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Pairs) -> float:
    """The share of rows whose generated text equals the target."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        batch = inputs_of(tokenizer, [source for source, _ in part])
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=1)
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right += sum(a.strip() == b for a, (_, b) in zip(said, part, strict=True))
    model.train()
    return right / len(rows)


def tune(
    name: str, pretrained: bool, arm: str, rate: float, steps: int, rows: Pairs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Trains one arm once."""
    backbone = load_backbone(name)
    model, tokenizer = backbone.model, backbone.tokenizer
    if not pretrained:
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(model.config)
    torch.manual_seed(0)
    parameters = trained_parameters(model, arm)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    random = np.random.default_rng(0)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / 20, (steps - step) / steps)
        chosen = [rows[i] for i in random.integers(0, len(rows), ROWS)]
        labels = tokenizer([target for _, target in chosen], return_tensors="pt", padding=True)
        batch = inputs_of(tokenizer, [source for source, _ in chosen])
        wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        model(**batch, labels=wanted).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model, tokenizer


def measure(name: str, pretrained: bool, arm: str, steps: int, data: dict[str, Pairs]) -> str:
    """Tunes at every rate, tests at the one that is best on validation; returns table cells."""
    begun = time.perf_counter()
    best: tuple[float, float, PreTrainedModel] | None = None
    for rate in RATES[arm]:
        model, tokenizer = tune(name, pretrained, arm, rate, steps, data["train"])
        found = accuracy(model, tokenizer, data["validation"])
        if best is None or found > best[0]:
            best = (found, rate, model)
    test = accuracy(best[2], tokenizer, data["test"])
    kind = "pretrained" if pretrained else "random"
    seconds = time.perf_counter() - begun
    return f"{arm} | {kind} | {best[1]:g} | {best[0]:.3f} | {test:.3f} | {seconds:.0f}"


def main() -> None:
    """Prints one line per model, task, arm and kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="t5-nano,t5-micro,t5-mini")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--arms", default="full,lora")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| model | task | majority | arm | weights | rate | validation | test | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        for task_name in arguments.tasks.split(","):
            task, folder = TASKS[task_name], arguments.data / task_name
            limits = {"train": 20_000, "validation": 300, "test": 500}
            data = {split: pairs(folder, task, split, most) for split, most in limits.items()}
            targets = [target for _, target in data["test"]]
            majority = max(targets.count(word) for word in task.words) / len(targets)
            for arm in arguments.arms.split(","):
                for pretrained in (True, False):
                    cells = measure(name, pretrained, arm, arguments.steps, data)
                    print(f"| {name} | {task_name} | {majority:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
