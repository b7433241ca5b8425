"""Pretrains the embedded T5 ladder: one tokenizer, three sizes, the same tokens in the same order.

Four stages, each cached in the work folder, so that a run started again goes on where it stopped:

1. a Unigram tokenizer of 8,192 pieces with byte fallback, trained on a sample of the corpus;
2. the whole corpus as one stream of token ids;
3. first embeddings: a truncated singular value decomposition of the corpus' positive pointwise
   mutual information (Levy and Goldberg, 2014, "Neural Word Embedding as Implicit Matrix
   Factorization"), because a network of this size sees only a fraction of the corpus in an hour;
4. per size: span corruption (Raffel et al., 2020, section 3.1.4), then a prefix-LM phase
   (Lester et al., 2021, section 3.1), AdamW, learning rate warmed up, held and decayed to zero.

    python scripts/pretrain.py --data ../shared/data/_corpus --work runs/pretrain --tokens 2000000
    python scripts/export_pretrained.py --work runs/pretrain

Every batch depends on (seed, step) alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretraining_text import (
    PAD,
    VOCABULARY,
    Ids,
    first_embeddings,
    prefixed,
    span_corrupted,
    stream,
    train_tokenizer,
    windows_of,
)
from tokenizers import Tokenizer
from transformers import T5Config, T5ForConditionalGeneration

BATCHES_OF_VALIDATION = 32
# A checkpoint falls on a reported step, so that the means of a resumed run are the same.
REPORT_EVERY, SAVE_EVERY, VALIDATE_EVERY = 100, 200, 500


@dataclass(frozen=True)
class Size:
    """One rung of the ladder: its shape (`layers` in encoder and decoder each) and its rates.

    A matrix learns at `rate` times its root mean square at the start, taken as `least` or more. The
    rates of the smaller two made the largest learn worse than them; its own were chosen on the
    training loss of the first 300 steps (4.75 against 4.85).
    """

    width: int
    inner: int
    heads: int
    head_width: int
    layers: int
    rate: float
    least: float


SIZES = {
    "t5-nano": Size(width=128, inner=256, heads=4, head_width=32, layers=3, rate=2e-2, least=0.03),
    "t5-micro": Size(width=192, inner=448, heads=6, head_width=32, layers=4, rate=2e-2, least=0.03),
    "t5-mini": Size(
        width=320, inner=640, heads=5, head_width=64, layers=4, rate=1.3e-2, least=0.015
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the corpus. `rates` holds one learning rate per size."""

    tokens: int = 2_000_000
    window: int = 128
    rows: int = 8
    noise: float = 0.25
    span: int = 3
    prefix_share: float = 0.13
    span_kept_in_prefix_phase: int = 4  # every fourth batch of that phase stays span corruption
    warmup: float = 0.04
    decay: float = 0.35
    embedding_rate: float = 1e-2  # of embeddings and norms, whose entries are of size 1
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps, of `rows` windows of `window` corpus tokens each."""
        return self.tokens // (self.rows * self.window)


def batch_at(
    step: int, windows: NDArray[np.uint16], order: Ids, recipe: Recipe, *, prefix: bool
) -> dict[str, torch.Tensor]:
    """Returns the batch of one step; a function of (seed, step) alone."""
    random = np.random.default_rng((recipe.seed, step))
    chosen = windows[order[step * recipe.rows : (step + 1) * recipe.rows]].astype(np.int64)
    sources, targets = (
        prefixed(chosen, random)
        if prefix
        else span_corrupted(chosen, recipe.noise, recipe.span, random)
    )
    return {"input_ids": torch.from_numpy(sources), "labels": torch.from_numpy(targets)}


def is_prefix_step(step: int, recipe: Recipe) -> bool:
    """Whether this step belongs to the prefix-LM objective."""
    start = round(recipe.steps * (1 - recipe.prefix_share))
    return step >= start and (step - start) % recipe.span_kept_in_prefix_phase != 0


def rate_factor(step: int, recipe: Recipe) -> float:
    """The learning rate at a step, as a share of its peak: warmup, hold, linear decay to zero."""
    warm, falling = recipe.warmup * recipe.steps, recipe.decay * recipe.steps
    return min(1.0, (step + 1) / warm, (recipe.steps - step) / falling)


def build(name: str, embeddings: torch.Tensor | None) -> T5ForConditionalGeneration:
    """Builds one rung with T5 v1.1's block (gated GELU) and, if given, its first embeddings."""
    size = SIZES[name]
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=size.width,
        d_ff=size.inner,
        d_kv=size.head_width,
        num_heads=size.heads,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    if embeddings is not None:
        model.shared.weight.data.copy_(embeddings)
        start_from_structure(model)
    return model


def distances(buckets: int, *, both_ways: bool) -> torch.Tensor:
    """Returns the distance that each of T5's relative-position buckets stands for.

    Buckets of tokens that come after the query have negative distances.
    """
    one_way = buckets // 2 if both_ways else buckets
    exact = one_way // 2
    steps = torch.arange(one_way, dtype=torch.float32)
    far = exact * (128 / exact) ** ((steps - exact) / (one_way - exact))
    before = torch.where(steps < exact, steps, far)
    return torch.cat([before, -before]) if both_ways else before


@torch.no_grad()
def start_from_structure(model: T5ForConditionalGeneration) -> None:
    """Starts attention from what it is known to become, which spares most of a long plateau.

    After Trockman and Kolter, 2023, "Mimetic Initialization of Self-Attention Layers": value and
    output projections compose to the identity, so attention passes embeddings on; in
    cross-attention query and key agree, so a sentinel finds itself in the source. Relative
    positions start local, as in Press et al., 2022 (ALiBi): the first head of each kind looks left,
    the second right (in the encoder), later ones ever farther.
    """
    config = model.config
    for name, module in model.named_modules():
        if type(module).__name__ == "T5Attention":
            torch.nn.init.orthogonal_(module.v.weight)
            module.o.weight.copy_(module.v.weight.T)
            if "EncDecAttention" in name:
                module.q.weight.copy_(module.k.weight * config.d_kv**-0.5)
            if module.has_relative_attention_bias:
                far = distances(config.relative_attention_num_buckets, both_ways="encoder" in name)
                slopes = torch.tensor([0.7, 0.7] + [0.7 * 0.4**h for h in range(1, 9)])
                bias = -far.abs()[:, None] * slopes[None, : config.num_heads]
                if "encoder" in name:
                    bias[:, 0] -= 4.0 * (far <= 0)
                    bias[:, 1] -= 4.0 * (far >= 0)
                module.relative_attention_bias.weight.copy_(bias.clamp(min=-8))
        elif type(module).__name__ == "T5DenseGatedActDense":
            module.wo.weight.mul_((2 * config.num_layers) ** -0.5)


def fused(model: T5ForConditionalGeneration) -> None:
    """Swaps the tanh GELU written out in Python for torch's own, the same function, for speed."""
    for module in model.modules():
        if type(module).__name__ == "T5DenseGatedActDense":
            module.act = torch.nn.GELU(approximate="tanh")


def optimiser_of(
    model: T5ForConditionalGeneration, size: Size, recipe: Recipe
) -> torch.optim.AdamW:
    """AdamW whose rate is relative to each tensor's scale, as T5's own Adafactor has it.

    T5's embeddings and norms are of size 1, its matrices far smaller; one rate for all leaves the
    former almost still, and the loss at that of a unigram model five times as long.
    """
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if name == "shared.weight" or parameter.ndim == 1:
            rate = recipe.embedding_rate
        elif "relative_attention_bias" in name:
            rate = size.rate
        else:
            scale = float(parameter.detach().pow(2).mean().sqrt())
            rate = size.rate * max(scale, size.least)
        groups.append({"params": [parameter], "lr": rate, "peak": rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


@torch.no_grad()
def validation_losses(
    model: T5ForConditionalGeneration, windows: NDArray[np.uint16], recipe: Recipe
) -> dict[str, float]:
    """Mean cross-entropy in nats per target token on held-out text, for both objectives."""
    model.eval()
    order = np.random.default_rng(1).permutation(len(windows))
    losses = {}
    for name, prefix in (("span", False), ("prefix", True)):
        of_batches = [
            float(model(**batch_at(i, windows, order, recipe, prefix=prefix)).loss)
            for i in range(BATCHES_OF_VALIDATION)
        ]
        losses[f"validation_{name}"] = sum(of_batches) / len(of_batches)
    model.train()
    return losses


class Pretraining:
    """One rung in training: the model, its optimiser, and what has been measured so far."""

    def __init__(self, name: str, folder: Path, recipe: Recipe, data: dict[str, Any]) -> None:
        self.name, self.folder, self.recipe = name, folder, recipe
        self.windows = windows_of(data["train"], recipe.window)
        self.held_out = windows_of(data["validation"], recipe.window)
        self.order = np.random.default_rng(recipe.seed).permutation(len(self.windows))
        if recipe.steps * recipe.rows > len(self.order):
            raise SystemExit(f"{recipe.tokens} tokens are more than the corpus has.")
        self.model = build(name, first_embeddings(data["train"], SIZES[name].width))
        fused(self.model)
        self.optimiser = optimiser_of(self.model, SIZES[name], recipe)
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
        self.losses: dict[str, list[float]] = {"span": [], "prefix": []}

    def step(self, step: int) -> None:
        """Takes one optimiser step."""
        recipe = self.recipe
        prefix = is_prefix_step(step, recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, recipe)
        batch = batch_at(step, self.windows, self.order, recipe, prefix=prefix)
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses["prefix" if prefix else "span"].append(loss.item())

    def report(self, done: int, seconds: float, *, validate: bool) -> None:
        """Adds a row to the loss curve and prints it."""
        row: dict[str, Any] = {"step": done, "tokens": done * self.recipe.rows * self.recipe.window}
        row |= {kind: sum(of) / len(of) if of else None for kind, of in self.losses.items()}
        if validate:
            row |= validation_losses(self.model, self.held_out, self.recipe)
        self.state["curve"].append(row | {"seconds": seconds})
        self.losses = {"span": [], "prefix": []}
        shown = {key: round(value, 3) for key, value in row.items() if value is not None}
        print(self.name, shown, f"{seconds:.0f} s", flush=True)

    def save(self, done: int, seconds: float) -> None:
        """Writes a checkpoint; an interrupted write leaves the last one whole."""
        self.state |= {"step": done, "seconds": seconds}
        tensors = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        part = self.folder / "checkpoint.part"
        torch.save(tensors | self.state, part)
        os.replace(part, self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Goes back to the checkpoint, if there is one."""
        if (self.folder / "checkpoint.pt").exists():
            saved = torch.load(self.folder / "checkpoint.pt", weights_only=True)
            self.model.load_state_dict(saved.pop("model"))
            self.optimiser.load_state_dict(saved.pop("optimiser"))
            self.state = saved


def train(name: str, work: Path, recipe: Recipe, data: dict[str, Any]) -> None:
    """Trains one rung to the end, going on from its checkpoint if there is one."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "result.json").exists():
        return
    run = Pretraining(name, folder, recipe, data)
    run.resume()
    begun = time.perf_counter() - run.state["seconds"]
    for step in range(run.state["step"], recipe.steps):
        run.step(step)
        done, last = step + 1, step + 1 == recipe.steps
        if done % REPORT_EVERY == 0 or last:
            validate = last or done % VALIDATE_EVERY == 0
            run.report(done, time.perf_counter() - begun, validate=validate)
        if done % SAVE_EVERY == 0 or last:
            run.save(done, time.perf_counter() - begun)
    result = {"parameters": run.model.num_parameters(), **run.state}
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def prepared(data: Path, work: Path) -> dict[str, Any]:
    """Returns the tokenizer and both streams, from the work folder where they lie there."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "tokenizer.json"
    if not file.exists():
        train_tokenizer(data).save(str(file))
    found: dict[str, Any] = {"tokenizer": Tokenizer.from_file(str(file))}
    for split in ("train", "validation"):
        cached = work / f"{split}.npy"
        if not cached.exists():
            np.save(cached, stream(data, split, found["tokenizer"]))
        found[split] = np.load(cached)
    return found


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="caches, results")
    parser.add_argument("--models", default=",".join(SIZES), help="names, in the order to train")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="corpus tokens per model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(tokens=arguments.tokens)
    data = prepared(arguments.data, arguments.work)
    (arguments.work / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    for name in arguments.models.split(","):
        train(name, arguments.work, recipe, data)


if __name__ == "__main__":
    main()
