"""How costs grow: a step of LoRA over depth, width, rows, length; K runs; resident deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.harness import Size, Work, interleave
from benchmarks.parallel import together
from benchmarks.steps import LINEAR, RANK, backward, base, floor_of, ids
from deltatune import api
from deltatune.testing.case import move

__all__ = ["Curve", "curves", "draw", "exponent"]

ALL = f"lora(rank={RANK}, at='{LINEAR['all'][0]}')"
LAYERS, LENGTH = 4, 64
STEP, SERVED = "A training step", "8 rows over 8 of the deltas, 32 tokens"


@dataclass(frozen=True)
class Curve:
    """Milliseconds of contenders at growing sizes.

    Attributes:
        title: what is measured.
        axis: what grows.
        sizes: its values.
        times: contender to its milliseconds, ours first.
    """

    title: str
    axis: str
    sizes: tuple[int, ...]
    times: Mapping[str, tuple[float, ...]]


def curves(size: Size) -> Iterator[Curve]:
    """Measures every curve; quick ones have the first three sizes."""
    count = 3 if size.name == "quick" else None

    def step(layers: int, width: int, rows: int, length: int) -> dict[str, Work]:
        def model() -> Any:
            return base(layers, size.dtype, width)

        delta = api.attach(with_delta := model(), ALL)
        delta.train()
        batch = ids(rows, length)
        return {
            "LoRA all-linear": backward(with_delta, batch),
            "floor": backward(floor_of(model()), batch),
        }

    def runs(k: int) -> dict[str, Work]:
        alone = together(base(LAYERS, size.dtype), ALL, 1, 2, 32)
        return {
            "at once": together(base(LAYERS, size.dtype), ALL, k, 2, 32),
            "one after the other": lambda: [alone() for _ in range(k)],
        }

    grown: Sequence[tuple[str, str, tuple[int, ...], Callable[[int], dict[str, Work]]]] = (
        (STEP, "layers", (2, 4, 8, 12), lambda n: step(n, 768, 4, LENGTH)),
        (STEP, "width", (256, 512, 768, 1024), lambda n: step(LAYERS, n, 4, LENGTH)),
        (STEP, "rows", (1, 2, 4, 8, 16), lambda n: step(LAYERS, 768, n, LENGTH)),
        (STEP, "tokens of a row", (16, 64, 128, 256, 512), lambda n: step(LAYERS, 768, 2, n)),
        ("A step of K runs of 2 x 32", "K", (1, 2, 4, 8, 16), runs),
        (SERVED, "resident deltas", (8, 64, 256, 512), lambda n: _served(size, n)),
    )
    for title, axis, sizes, contenders in grown:
        chosen = sizes[:count]
        measured = [interleave(contenders(n), size.rounds) for n in chosen]
        times = {name: tuple(1e3 * one[name] for one in measured) for name in measured[0]}
        yield Curve(title, axis, chosen, times)


def _served(size: Size, resident: int) -> dict[str, Work]:
    bare, model = base(LAYERS, size.dtype), base(LAYERS, size.dtype)
    bank = api.attach(model, "lora(rank=8)", slots=resident)
    move(bank)
    batch = ids(8, 32)
    slots = np.random.default_rng(0).permutation(resident)[:8].tolist()

    def ours() -> None:
        with bank.route(slots), torch.inference_mode():
            model(input_ids=batch)

    def alone() -> None:
        with torch.inference_mode():
            bare(input_ids=batch)

    return {"LoRA q, v": ours, "base alone": alone}


def exponent(curve: Curve) -> float:
    """The power of the size with which our time grows, over the larger half of the sizes."""
    half = len(curve.sizes) // 2
    ours = next(iter(curve.times.values()))
    slope, _ = np.polyfit(np.log(curve.sizes[half:]), np.log(ours[half:]), 1)
    return float(slope)


def draw(found: Sequence[Curve], path: Path) -> None:
    """Draws all curves into one picture."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for curve, place in zip(found, axes.flat, strict=True):
        for name, times in curve.times.items():
            place.plot(curve.sizes, times, marker="o", label=name)
        place.set_title(curve.title, fontsize="medium")
        place.set(xlabel=curve.axis, ylabel="ms", xscale="log", yscale="log")
        place.set_xticks(curve.sizes, [str(size) for size in curve.sizes], minor=False)
        every = [one for times in curve.times.values() for one in times]
        # Whole decades, so that every axis has numbers and a flat line looks flat.
        ends = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
        place.set_ylim(10.0 ** ends[0], 10.0 ** ends[1])
        place.minorticks_off()
        place.grid(alpha=0.3)
        place.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
