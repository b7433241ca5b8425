"""The text side of `scripts/pretrain.py`: tokenizer, ids, first embeddings, objectives."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers

VOCABULARY = 8192
SENTINELS = 100
PAD, END, UNKNOWN = 0, 1, 2
FIRST_SENTINEL = VOCABULARY - 1  # <extra_id_0>; as in T5, the sentinels count down from the end
Ids = NDArray[np.int64]


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


def splitting() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """How text is cut before pieces are looked up.

    Whitespace is collapsed as in T5. Punctuation never joins a word.
    """
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"▁?[^\p{L}\p{N}\p{M}'▁]"), "isolated"),
        ]
    )
    return normalizer, pre_tokenizer


def learned_pieces(texts: list[str], count: int) -> list[tuple[str, float]]:
    """Learns `count` Unigram pieces with their log probabilities."""
    learner = Tokenizer(models.Unigram())
    learner.normalizer, learner.pre_tokenizer = splitting()
    trainer = tokenizer_trainers.UnigramTrainer(
        vocab_size=count + 1, unk_token="<unk>", special_tokens=["<unk>"], max_piece_length=16
    )
    learner.train_from_iterator(common_only(texts), trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    pieces = [(piece, score) for piece, score in vocabulary if piece != "<unk>"][:count]
    if len(pieces) != count:
        raise SystemExit(f"The corpus gave {len(pieces)} pieces, {count} are needed.")
    return pieces


def train_tokenizer(data: Path, every: int = 10) -> Tokenizer:
    """Trains the tokenizer on every tenth document; what no piece covers is spelled in bytes."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    sample = [text for i, text in enumerate(documents(data, "train")) if i % every == 0]
    pieces = learned_pieces(sample, VOCABULARY - 3 - 256 - SENTINELS)
    rare = min(score for _, score in pieces) - 10
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", rare) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary + pieces, unk_id=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = splitting()
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
    texts = list(documents(data, split))
    for start in range(0, len(texts), 64):
        encoded = tokenizer.encode_batch_fast(texts[start : start + 64])
        ids += [np.array(one.ids, dtype=np.uint16) for one in encoded]
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


def span_corrupted(
    windows: Ids, noise: float, mean_span: int, random: np.random.Generator
) -> tuple[Ids, Ids]:
    """Replaces random spans by sentinels. Windows (rows, length) -> (sources, targets).

    The number of spans depends on the length alone, so no padding is needed.
    """
    rows, length = windows.shape
    hidden = round(length * noise)
    spans = max(1, round(hidden / mean_span))
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
