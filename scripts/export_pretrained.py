"""Writes what `scripts/pretrain.py` has trained into the package: weights, tokenizer, cards.

    python scripts/export_pretrained.py --work runs/pretrain

Weights are rounded to bf16 and cut into files below 15 MB; validation losses on the card are those
of the rounded weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain import SIZES, Recipe, build, fused, validation_losses
from pretraining_text import SENTINELS, windows_of
from transformers import PreTrainedTokenizerFast

WEIGHTS = Path(__file__).resolve().parent.parent / "src" / "deltatune" / "backbones" / "weights"

TEMPLATE = Path(__file__).resolve().parent / "card_of_pretrained.md"


def export_tokenizer(work: Path) -> None:
    """Writes the tokenizer that the ladder shares."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=512,
    )
    tokenizer.save_pretrained(WEIGHTS / "tokenizer")


def export(name: str, work: Path) -> None:
    """Writes one rung: configuration, weights in bf16, loss curve and card."""
    saved = json.loads((work / name / "result.json").read_text())
    recipe = Recipe(**json.loads((work / "recipe.json").read_text()))
    model = build(name, None)
    checkpoint = torch.load(work / name / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    folder = WEIGHTS / name
    shutil.rmtree(folder, ignore_errors=True)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(folder, max_shard_size="14MB")
    fused(model)
    held_out = windows_of(np.load(work / "validation.npy"), recipe.window)
    losses = validation_losses(model.float(), held_out, recipe)
    write_curve(folder / "loss.csv", saved["curve"])
    (folder / "CARD.md").write_text(card(name, saved, recipe, losses, work))
    print(name, losses, {p.name: p.stat().st_size for p in sorted(folder.iterdir())})


def write_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    """Writes the loss curve as CSV; an empty cell was not measured at that step."""
    columns = [
        "step",
        "tokens",
        "span",
        "prefix",
        "validation_span",
        "validation_prefix",
        "seconds",
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in curve:
            writer.writerow({k: round(v, 4) for k, v in row.items() if v is not None})


def card(
    name: str, saved: dict[str, Any], recipe: Recipe, losses: dict[str, float], work: Path
) -> str:
    """Fills in the card."""
    chosen = saved["curve"][1::2]
    curve = "\n".join(
        f"| {row['tokens']:,} | {row['span']:.3f} | "
        f"{'' if row['prefix'] is None else format(row['prefix'], '.3f')} |"
        for row in chosen
    )
    start = round(recipe.steps * (1 - recipe.prefix_share))
    late = recipe.steps - start
    prefix_steps = late - -(-late // recipe.span_kept_in_prefix_phase)
    return TEMPLATE.read_text().format(
        name=name,
        parameters=saved["parameters"],
        corpus=len(np.load(work / "train.npy", mmap_mode="r")),
        span_steps=recipe.steps - prefix_steps,
        prefix_steps=prefix_steps,
        seconds=saved["seconds"],
        held_out="articles and a novel that training never saw",
        span_loss=losses["validation_span"],
        prefix_loss=losses["validation_prefix"],
        curve=curve,
        **vars(SIZES[name]),
        **{k: v for k, v in vars(recipe).items() if k != "tokens"},
        tokens=recipe.steps * recipe.rows * recipe.window,
    )


def main() -> None:
    """Exports every rung that is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--models", default=",".join(SIZES))
    arguments = parser.parse_args()
    export_tokenizer(arguments.work)
    for name in arguments.models.split(","):
        export(name, arguments.work)


if __name__ == "__main__":
    main()
