"""Measures every row of the table of goals and writes docs/results/bench.md and bench.json.

A row that was measured with this code is kept in `build/bench.jsonl` and not measured again.
`--quick` takes small models and fewer rounds, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from benchmarks import life, padding, parallel, serving, steps  # noqa: E402
from benchmarks.harness import Row, Size, machine, versions  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from deltatune.study.source import code_version  # noqa: E402

KEPT, RESULTS = ROOT / "build" / "bench.jsonl", ROOT / "docs" / "results"
PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "steps": steps.rows,
    "parallel": parallel.rows,
    "serving": serving.rows,
    "life": life.rows,
    "padding": padding.rows,
}
COLUMNS = ("id", "metric", "peer", "floor", "ours", "ratio", "must", "stretch", "holds")


def main() -> int:
    """Measures what is missing; the exit code is 0 whether or not every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, under 5 minutes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part of the table")
    chosen = parser.parse_args()
    name, layers, rounds = ("quick", 2, 3) if chosen.quick else ("full", 12, 7)
    size = Size(name, layers, rounds, getattr(torch, chosen.dtype))
    # The machine is looked at before the load of the measurements.
    measured_on = {"machine": machine(), "versions": versions()}
    rows: list[dict[str, Any]] = []
    warnings.simplefilter("ignore")
    for part in PARTS if chosen.only is None else (chosen.only,):
        rows += _part(part, size, chosen.dtype)
    rows.sort(key=lambda row: [int(part) for part in row["id"].split(".")])
    Console(width=160).print(_table(rows))
    if not chosen.quick and chosen.only is None:
        RESULTS.joinpath("bench.json").write_text(
            json.dumps({**measured_on, "dtype": chosen.dtype, "rows": rows}, indent=1) + "\n"
        )
        RESULTS.joinpath("bench.md").write_text(_page(rows, measured_on, chosen.dtype))
    return 0


def _part(part: str, size: Size, dtype: str) -> list[dict[str, Any]]:
    key = f"{code_version()} {part} {size.name} {dtype}"
    kept = [json.loads(line) for line in KEPT.open()] if KEPT.exists() else []
    found: list[dict[str, Any]] = next((one["rows"] for one in kept if one["key"] == key), [])
    if found:
        return found
    for row in PARTS[part](size):
        found.append(row.as_json())
        print(json.dumps(found[-1]), flush=True)
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a") as file:
        print(json.dumps({"key": key, "rows": found}), file=file)
    return found


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in COLUMNS))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _page(rows: Sequence[dict[str, Any]], measured_on: dict[str, Any], dtype: str) -> str:
    machine, held = measured_on["machine"], sum(row["holds"] for row in rows)
    speeds = machine["gflops_of_1024_products"].items()
    speed = ", ".join(f"{number} in {name}" for name, number in speeds)
    lines = [f"| {' | '.join(_cell(row[name]) for name in COLUMNS)} |" for row in rows]
    return "\n".join(
        [
            "# Time and memory",
            "",
            f"{machine['processor']}, {machine['threads']} thread of {machine['cores']} cores, "
            f"{'with' if machine['amx'] else 'without'} AMX. Products of 1024: {speed} GFLOP/s. "
            + ", ".join(f"{name} {text}" for name, text in measured_on["versions"].items())
            + f". Backbones in {dtype}. Contenders take turns in one process; the shortest of at "
            "least 7 rounds counts. Made by `make bench`.",
            "",
            f"{held} of {len(rows)} bounds hold. They were set for bf16 on a processor with AMX "
            "(2,500 GFLOP/s), where what a library adds to the products weighs far more than here. "
            "Goals without a row (8, 9, 10, 17) are not built.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * len(COLUMNS),
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
