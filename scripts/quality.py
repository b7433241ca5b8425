"""Whether the fast roads train as well as the plain one: LoRA on four real tasks with MiniLM.

Each road trains every task with five seeds; a row of the table is a road. Runs that are done are
kept in build/quality. Needs $DELTATUNE_DATA; writes docs/results/quality.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.harness import machine, versions  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from deltatune import api  # noqa: E402
from deltatune.study.cell import Cell, CellResult  # noqa: E402
from deltatune.training.settings import Settings  # noqa: E402

KEPT, PAGE = ROOT / "build" / "quality", ROOT / "docs" / "results" / "quality.md"
TASKS = ("trec", "sms_spam", "glue_sst2", "emotion")
SEEDS, STEPS = 5, 150
BF16 = {"dtype": "bfloat16"}
# road -> (runs at once, further settings, further options)
ROADS: Mapping[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32, one by one": (1, {}, {}),
    "fp32, five at once": (5, {}, {}),
    "fp32, five at once, packed": (5, {"packing": True}, {}),
    "bf16, five at once, packed": (5, {"packing": True}, BF16),
}


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--road", choices=tuple(ROADS), help="one road; no page")
    chosen = parser.parse_args()
    found = {
        road: {task: scores(road, task) for task in TASKS}
        for road in (ROADS if chosen.road is None else (chosen.road,))
    }
    if chosen.road is None:
        PAGE.write_text(page(found))
        print(PAGE.read_text())


def scores(road: str, task: str) -> list[float]:
    """The test scores of all seeds, in percent."""
    slots, settings, options = ROADS[road]
    cells = [
        Cell(
            backbone="minilm",
            task=task,
            method="lora(rank=8)",
            seed=seed,
            budget=f"{STEPS} steps",
            settings=Settings(
                learning_rate=3e-3, warmup_ratio=0.1, length_grouped=True, checkpoint_every=None,
                **settings,
            ),
            options={"train_rows": 2000, "validation_rows": 150, "test_rows": 400,
                     "maximum_source": 64, **options},
        )
        for seed in range(SEEDS)
    ]  # fmt: skip
    folder = KEPT / road.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task}.json"
    if not file.exists():
        if slots == 1:
            results = [result for cell in cells for result in api.train_many([cell])]
        else:
            results = api.train_many(cells, slots=slots)
        kept = [one for one in results if isinstance(one, CellResult)]
        if len(kept) < SEEDS:
            raise SystemExit(f"{road}, {task}: {[one for one in results if one not in kept]}")
        file.write_bytes(TypeAdapter(list[CellResult]).dump_json(kept))
    held = TypeAdapter(list[CellResult]).validate_json(file.read_bytes())
    found = [100 * one.score for one in held]
    shown = ", ".join(f"{score:.1f}" for score in found)
    seconds = sum(one.seconds for one in held)
    print(f"{road}, {task}: {shown}; {seconds:.0f} s", flush=True)
    return found


def page(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The table in Markdown."""
    plain = found["fp32, one by one"]
    lines = [
        f"| {road} | "
        + " | ".join(
            f"{statistics.fmean(held):.1f} ± {statistics.stdev(held):.1f}"
            + ("" if held is plain[task] else f" ({_difference(held, plain[task])})")
            for task, held in tasks.items()
        )
        + " |"
        for road, tasks in found.items()
    ]
    libraries = versions(("torch", "transformers")).items()
    return "\n".join(
        [
            "# Do the fast roads train as well?",
            "",
            f"LoRA of rank 8 on MiniLM, {STEPS} steps of 16 rows, 400 test rows, {SEEDS} seeds: "
            "the mean and sample standard deviation of the task's metric, times 100. In brackets "
            "the mean difference from the plain road with the same seed, and its standard error. "
            "bf16 is the backbone in bfloat16 with deltas in fp32. Made by "
            f"`python scripts/quality.py` on {machine()['processor']}, "
            + ", ".join(f"{name} {text}" for name, text in libraries)
            + ".",
            "",
            f"| road | {' | '.join(TASKS)} |",
            "|---" * (1 + len(TASKS)) + "|",
            *lines,
            "",
        ]
    )  # fmt: skip


def _difference(held: list[float], plain: list[float]) -> str:
    pairs = [mine - theirs for mine, theirs in zip(held, plain, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.fmean(pairs):+.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
