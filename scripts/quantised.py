"""What rounding a frozen base costs: MiniLM's sentence vectors, and LoRA on TREC, by format.

Prints a table in Markdown. The vectors are those of TREC's test questions, compared with the ones
of the base in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from benchmarks.harness import versions  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from deltatune import api  # noqa: E402
from deltatune.backbones.load import load_backbone  # noqa: E402
from deltatune.backbones.sentence import POOLINGS  # noqa: E402
from deltatune.core.quantised import base_bytes  # noqa: E402
from deltatune.tasks.records import find_task  # noqa: E402

FORMATS: tuple[str | None, ...] = (None, "int8", "nf4")


def main() -> None:
    """Prints a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    questions = [example.texts[0] for example in find_task("trec").load(None, "clean").test]
    print("| base | MB | cosine, mean | cosine, least | LoRA on TREC, macro F1 by seed | mean |")
    print("|---|---|---|---|---|---|", flush=True)
    whole: Tensor | None = None
    for format in FORMATS:
        size, found = vectors(format, questions)
        whole = found if whole is None else whole
        cosines = functional.cosine_similarity(found, whole)
        scores = [score(format, chosen.steps, seed) for seed in range(chosen.seeds)]
        cells = [
            format or "fp32",
            f"{size / 1e6:.1f}",
            f"{cosines.mean():.4f}",
            f"{cosines.min():.4f}",
            ", ".join(f"{100 * one:.1f}" for one in scores),
            f"{100 * statistics.mean(scores):.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(questions)} questions; {versions(('torch', 'transformers', 'bitsandbytes'))}")


@torch.no_grad()
def vectors(format: str | None, texts: list[str]) -> tuple[int, Tensor]:
    """Bytes of the base, and the sentence vectors of texts, [texts, width]."""
    backbone = load_backbone("minilm", quantise=format)
    found = []
    for start in range(0, len(texts), 50):
        batch = backbone.tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
        hidden = backbone.model(**batch).last_hidden_state
        found.append(POOLINGS["mean_tokens"](hidden, batch["attention_mask"]))
    return base_bytes(backbone.model), torch.cat(found)


def score(format: str | None, steps: int, seed: int) -> float:
    """The score of the test rows after some steps of LoRA."""
    options = {} if format is None else {"quantise": format}
    options |= {"validation_rows": 50}
    result = api.train(
        "minilm", "trec", "lora(rank=8)", budget=f"{steps} steps", seed=seed, options=options
    )
    return result.scores[result.metric]


if __name__ == "__main__":
    main()
