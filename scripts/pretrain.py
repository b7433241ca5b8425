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
    python scripts/pretrain.py --data ../shared/data/_corpus --work runs/pretrain --export

Every batch depends on (seed, step) alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from transformers import T5Config, T5ForConditionalGeneration

VOCABULARY = 8192
SENTINELS = 100
PAD, END, UNKNOWN = 0, 1, 2
FIRST_SENTINEL = VOCABULARY - 1  # <extra_id_0>; as in T5, the sentinels count down from the end
BATCHES_OF_VALIDATION = 32
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """The shape of one rung of the ladder; `layers` in the encoder and again in the decoder."""

    width: int
    inner: int
    heads: int
    head_width: int
    layers: int


SIZES = {
    "t5-nano": Size(width=128, inner=256, heads=4, head_width=32, layers=3),
    "t5-micro": Size(width=192, inner=448, heads=6, head_width=32, layers=4),
    "t5-mini": Size(width=320, inner=640, heads=5, head_width=64, layers=4),
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
    matrix_rate: float = 2e-2  # relative to the matrix' root mean square at the start
    embedding_rate: float = 1e-2
    norm_rate: float = 1e-2
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps, of `rows` windows of `window` corpus tokens each."""
        return self.tokens // (self.rows * self.window)


def documents(data: Path, split: str) -> Iterator[str]:
    """Yields the corpus' texts, the novels spread evenly among the articles."""
    files = {
        kind: sorted(data.glob(f"{kind}_en_{split}*.jsonl.gz")) for kind in ("wikipedia", "novels")
    }
    texts = {
        kind: [text for path in paths for text in _texts(path)] for kind, paths in files.items()
    }
    if not all(texts.values()):
        raise SystemExit(f"No {split} files of wikipedia_en and novels_en in {data}.")
    placed = [
        ((index + 0.5) / len(of_kind), text)
        for of_kind in texts.values()
        for index, text in enumerate(of_kind)
    ]
    yield from (text for _, text in sorted(placed, key=lambda pair: pair[0]))


def _texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def common_only(texts: list[str], least: int = 300) -> list[str]:
    """Blanks characters seen fewer than `least` times, so that no piece is spent on them."""
    counts = Counter(character for text in texts for character in text)
    rare = {ord(character): " " for character, count in counts.items() if count < least}
    return [text.translate(rare) for text in texts]


def train_tokenizer(data: Path, every: int = 10) -> Tokenizer:
    """Trains the tokenizer on every tenth document.

    Whitespace is collapsed as in T5. Punctuation never joins a word. Rare characters are spelled
    in bytes.
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"▁?[^\p{L}\p{N}\p{M}'▁]"), "isolated"),
        ]
    )
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    pieces = VOCABULARY - 3 - 256 - SENTINELS
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizer
    learner.pre_tokenizer = split
    trainer = tokenizer_trainers.UnigramTrainer(
        vocab_size=pieces + 1, unk_token="<unk>", special_tokens=["<unk>"], max_piece_length=16
    )
    sample = [text for i, text in enumerate(documents(data, "train")) if i % every == 0]
    learner.train_from_iterator(common_only(sample), trainer)
    learned = [tuple(p) for p in json.loads(learner.to_str())["model"]["vocab"] if p[0] != "<unk>"]
    lowest = min(score for _, score in learned)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", lowest - 10) for byte in range(256)]
    vocabulary += learned[:pieces]
    if len(vocabulary) != VOCABULARY - SENTINELS:
        raise SystemExit(f"The corpus gave {len(learned)} pieces, {pieces} are needed.")
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *reversed(sentinels)])
    return tokenizer


def stream(data: Path, split: str, tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Returns the whole split as one stream of ids, each document closed by </s>."""
    ids: list[NDArray[np.uint16]] = []
    batch: list[str] = []
    texts = list(documents(data, split))
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        ids += [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(batch)]
    return np.concatenate(ids)


def first_embeddings(ids: NDArray[np.uint16], width: int, reach: int = 5) -> torch.Tensor:
    """Returns embeddings (VOCABULARY, width) of unit root mean square per piece.

    Rows of pieces that never occur (sentinels, rare bytes) are drawn from a standard normal.
    """
    torch.manual_seed(0)
    size = VOCABULARY
    counts = np.zeros(size * size, dtype=np.float32)
    for distance in range(1, reach + 1):
        left, right = ids[:-distance].astype(np.int64), ids[distance:].astype(np.int64)
        counts += np.bincount(left * size + right, minlength=size * size) / np.float32(distance)
    joint = torch.from_numpy(counts).view(size, size)
    joint = joint + joint.T
    row = joint.sum(1, keepdim=True)
    context = row.T**0.75
    expected = row * (context / context.sum())
    positive = torch.where(joint > 0, (joint / expected).log().clamp(min=0), 0.0)
    left_vectors, values, _ = torch.svd_lowrank(positive, q=width + 32, niter=3)
    vectors = (left_vectors * values.sqrt())[:, :width]
    seen = row[:, 0] > 20
    vectors = vectors - vectors[seen].mean(0)
    vectors = vectors / vectors.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    return torch.where(seen[:, None], vectors, torch.randn(size, width))


def span_corrupted(windows: Ids, recipe: Recipe, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Replaces random spans by sentinels. Windows (rows, length) -> (sources, targets).

    The number of spans depends on the length alone, so no padding is needed.
    """
    rows, length = windows.shape
    hidden = round(length * recipe.noise)
    spans = max(1, round(hidden / recipe.span))
    sources = np.empty((rows, length - hidden + spans + 1), dtype=np.int64)
    targets = np.empty((rows, hidden + spans + 1), dtype=np.int64)
    for r in range(rows):
        lengths = np.empty(2 * spans, dtype=np.int64)
        lengths[0::2] = _parts(length - hidden, spans, random)
        lengths[1::2] = _parts(hidden, spans, random)
        pieces = np.split(windows[r], np.cumsum(lengths)[:-1])
        source: list[Ids] = []
        target: list[Ids] = []
        for s in range(spans):
            sentinel = np.array([FIRST_SENTINEL - s])
            source += [pieces[2 * s], sentinel]
            target += [sentinel, pieces[2 * s + 1]]
        sources[r] = np.concatenate([*source, [END]])
        targets[r] = np.concatenate([*target, [END]])
    return sources, targets


def _parts(total: int, count: int, random: np.random.Generator) -> Ids:
    """Cuts `total` into `count` parts of one or more, all cuts equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def prefixed(windows: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Cuts all windows at one random place: (prefix and </s>, continuation)."""
    length = windows.shape[1]
    cut = int(random.integers(length // 4, 3 * length // 4))
    ends = np.full((len(windows), 1), END, dtype=np.int64)
    return np.concatenate([windows[:, :cut], ends], 1), np.ascontiguousarray(windows[:, cut:])


def windows_of(ids: NDArray[np.uint16], window: int) -> NDArray[np.uint16]:
    """Cuts the stream into windows, (count, window)."""
    return ids[: len(ids) // window * window].reshape(-1, window)


def batch_at(
    step: int, windows: NDArray[np.uint16], order: Ids, recipe: Recipe, *, prefix: bool
) -> dict[str, torch.Tensor]:
    """Returns the batch of one step; a function of (seed, step) alone."""
    random = np.random.default_rng((recipe.seed, step))
    chosen = windows[order[step * recipe.rows : (step + 1) * recipe.rows]].astype(np.int64)
    sources, targets = (
        prefixed(chosen, random) if prefix else span_corrupted(chosen, recipe, random)
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


def optimiser_of(model: T5ForConditionalGeneration, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW whose rate is relative to each tensor's scale, as T5's own Adafactor has it.

    T5's embeddings and norms are of size 1, its matrices far smaller; one rate for all leaves the
    former almost still, and the loss at that of a unigram model five times as long.
    """
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if name == "shared.weight":
            rate = recipe.embedding_rate
        elif parameter.ndim == 1:
            rate = recipe.norm_rate
        elif "relative_attention_bias" in name:
            rate = recipe.matrix_rate
        else:
            scale = float(parameter.detach().pow(2).mean().sqrt())
            rate = recipe.matrix_rate * max(scale, 0.03)
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


def train(name: str, work: Path, recipe: Recipe, data: dict[str, Any]) -> None:
    """Trains one rung to the end, going on from its checkpoint if there is one."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "result.json").exists():
        return
    model = build(name, first_embeddings(data["train"], SIZES[name].width))
    fused(model)
    optimiser = optimiser_of(model, recipe)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved.pop("model"))
        optimiser.load_state_dict(saved.pop("optimiser"))
        state = saved
    windows = windows_of(data["train"], recipe.window)
    held_out = windows_of(data["validation"], recipe.window)
    order = np.random.default_rng(recipe.seed).permutation(len(windows))
    if recipe.steps * recipe.rows > len(order):
        raise SystemExit(f"{recipe.tokens} tokens are more than the corpus has.")
    begun = time.perf_counter() - state["seconds"]
    sums = {"span": [0.0, 0], "prefix": [0.0, 0]}
    for step in range(state["step"], recipe.steps):
        prefix = is_prefix_step(step, recipe)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, recipe)
        loss = model(**batch_at(step, windows, order, recipe, prefix=prefix)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        optimiser.zero_grad()
        of_kind = sums["prefix" if prefix else "span"]
        of_kind[0] += loss.item()
        of_kind[1] += 1
        done = step + 1
        if done % 100 == 0 or done == recipe.steps:
            row = {"step": done, "tokens": done * recipe.rows * recipe.window}
            row |= {kind: s / n if n else None for kind, (s, n) in sums.items()}
            if done % 500 == 0 or done == recipe.steps:
                row |= validation_losses(model, held_out, recipe)
            row["seconds"] = time.perf_counter() - begun
            state["curve"].append(row)
            sums = {"span": [0.0, 0], "prefix": [0.0, 0]}
            print(name, {k: round(v, 3) if v else v for k, v in row.items()}, flush=True)
        if done % 200 == 0 or done == recipe.steps:
            state |= {"step": done, "seconds": time.perf_counter() - begun}
            part = folder / "checkpoint.part"
            torch.save(
                {"model": model.state_dict(), "optimiser": optimiser.state_dict(), **state}, part
            )
            os.replace(part, checkpoint)
    result = {"parameters": sum(p.numel() for p in model.parameters()), **state}
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
    """Reads the command line and trains or exports."""
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
