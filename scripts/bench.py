"""Measures every row of the table of goals and writes docs/results/bench.md and bench.json.

Parts that were measured with this code are kept in `build/bench.jsonl` and not measured again;
`--only` measures one part, and the page takes the others as they were measured last.
`--quick` takes small models and fewer rounds, and writes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from benchmarks import (  # noqa: E402
    growth,
    life,
    loading,
    padding,
    parallel,
    quantised,
    serving,
    steps,
    trunk,
)
from benchmarks.harness import Row, Size, machine, versions  # noqa: E402
from benchmarks.shares import KINDS  # noqa: E402
from revision import revision  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from deltatune.study.source import code_version  # noqa: E402

KEPT, RESULTS = ROOT / "build" / "bench.jsonl", ROOT / "docs" / "results"
PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    "steps": steps.rows,
    "parallel": parallel.rows,
    "serving": serving.rows,
    "life": life.rows,
    "loading": loading.rows,
    "trunk": trunk.rows,
    "quantised": quantised.rows,
    "padding": padding.rows,
}
# What the figures of a row do not say themselves.
REMARKS: Mapping[str, str] = {
    "10.1": "Twelve blocks forward and two back, against two and two: 14 to 4, or 3.5, is what the "
    "products allow.",
    "14.1": "A save of ours also looks for what is not finite, counts zeros, hashes the file and "
    "the slot, and describes every tensor; PEFT's does not.",
    "18.1.1": "The floor is one pass over the backbone, of which PEFT reads no byte.",
    "18.2.1": "The floor is one pass over the backbone, of which PEFT reads no byte.",
}
COLUMNS = ("id", "metric", "peer", "floor", "ours", "ratio", "must", "stretch", "holds")


def main() -> int:
    """Measures what is missing; the exit code is 0 whether or not every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, under 5 minutes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part of the table")
    parser.add_argument("--growth", action="store_true", help="how costs grow, instead")
    chosen = parser.parse_args()
    name, layers, rounds = ("quick", 2, 2) if chosen.quick else ("full", 12, 7)
    size = Size(name, layers, rounds, getattr(torch, chosen.dtype))
    # The machine is looked at before the load of the measurements.
    measured_on = {"machine": machine(), "versions": versions()}
    warnings.simplefilter("ignore")
    if chosen.growth:
        return _growth(size, chosen.dtype, measured_on)
    measured = {
        part: _part(part, size, chosen.dtype)
        for part in (PARTS if chosen.only is None else (chosen.only,))
    }
    Console(width=160).print(_table(_in_order(measured)))
    if not chosen.quick:
        measured = {part: _kept(f" {part} {name} {chosen.dtype}") for part in PARTS}
        rows = _in_order(measured)
        commits = {part: held["commit"] for part, held in measured.items() if held}
        content = {
            **measured_on,
            "dtype": chosen.dtype,
            "commits": commits,
            "rows": [{name: one[name] for name in COLUMNS} for one in rows],
            "profiles": {one["id"]: one["profile"] for one in rows if one["profile"]},
        }
        RESULTS.joinpath("bench.json").write_text(json.dumps(content, indent=1) + "\n")
        RESULTS.joinpath("bench.md").write_text(_page(rows, commits, measured_on, chosen.dtype))
    return 0


def _in_order(measured: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [row for held in measured.values() for row in held.get("rows", ())]
    return sorted(rows, key=lambda row: [int(part) for part in row["id"].split(".")])


def _growth(size: Size, dtype: str, measured_on: dict[str, Any]) -> int:
    """Measures and draws the curves; the page holds every figure."""
    found = []
    for curve in growth.curves(size):
        found.append(curve)
        print(curve, flush=True)
    if size.name == "quick":
        return 0
    growth.draw(found, RESULTS / "growth.svg")
    lines = ["# How costs grow", "", _measured_on(measured_on, dtype), "", "![](growth.svg)", ""]
    for curve in found:
        power = growth.exponent(curve)
        lines += [f"## {curve.title}, by {curve.axis}", "",
                  f"| {curve.axis} | {' | '.join(f'{name}, ms' for name in curve.times)} |",
                  "|---" * (1 + len(curve.times)) + "|"]  # fmt: skip
        for k, at in enumerate(curve.sizes):
            lines.append(f"| {at} | {' | '.join(f'{t[k]:.4g}' for t in curve.times.values())} |")
        lines += [
            "",
            f"Over the larger half of these sizes time grows with the power {power:.2f}.",
            "",
        ]
    RESULTS.joinpath("growth.md").write_text("\n".join(lines))
    return 0


def _part(part: str, size: Size, dtype: str) -> dict[str, Any]:
    """The rows of a part, measured unless they were with this code, and the commit."""
    key = f"{code_version()} {_own_version()} {part} {size.name} {dtype}"
    if found := _kept(key):
        return found
    rows: list[dict[str, Any]] = []
    for row in PARTS[part](size):
        rows.append(row.as_json())
        print(json.dumps(rows[-1]), flush=True)
    found = {"key": key, "commit": revision(), "machine": machine(), "rows": rows}
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a") as file:
        print(json.dumps(found), file=file)
    return found


def _own_version() -> str:
    """A digest of the measurements themselves."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _kept(end: str) -> dict[str, Any]:
    """The last measurement whose key ends so; empty if there is none."""
    kept = [json.loads(line) for line in KEPT.open()] if KEPT.exists() else []
    return next((one for one in reversed(kept) if one["key"].endswith(end)), {})


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


def _page(
    rows: Sequence[dict[str, Any]],
    commits: Mapping[str, str],
    measured_on: dict[str, Any],
    dtype: str,
) -> str:
    held = sum(row["holds"] for row in rows)
    lines = [f"| {' | '.join(_cell(row[name]) for name in COLUMNS)} |" for row in rows]
    return "\n".join(
        [
            "# Time and memory",
            "",
            _measured_on(measured_on, dtype),
            "",
            f"{held} of {len(rows)} bounds hold. They were set for bf16 on a processor with AMX "
            "(2,500 GFLOP/s), where what a library adds to the products weighs far more than here. "
            + ("How costs grow: [growth](growth.md)." if _grown() else ""),
            "",
            "Measured at "
            + ", ".join(f"{commit} ({part})" for part, commit in commits.items())
            + ".",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + "---|" * len(COLUMNS),
            *lines,
            "",
            *_in_another_dtype(dtype, measured_on["machine"]["processor"]),
            *_misses(rows),
        ]
    )


def _in_another_dtype(dtype: str, name: str) -> list[str]:
    """The rows that were measured on this machine with backbones of the other dtype."""
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    measured = {part: _kept(f" {part} full {other}") for part in PARTS}
    own = {
        part: held
        for part, held in measured.items()
        if held.get("machine", {}).get("processor") == name
    }
    if not own:
        return []
    rows = _in_order(own)
    commits = ", ".join(f"{held['commit']} ({part})" for part, held in own.items())
    return [
        f"## With backbones in {other}",
        "",
        f"{sum(row['holds'] for row in rows)} of {len(rows)} bounds hold. Measured at {commits}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
        *(f"| {' | '.join(_cell(row[name]) for name in COLUMNS)} |" for row in rows),
        "",
    ]


def _misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the floor says of each bound that does not hold, and where the time goes."""
    missed = [row for row in rows if not row["holds"]]
    if not missed:
        return []
    lines = [
        "## Bounds that do not hold",
        "",
        "The floor is the least that the work can take here: the frozen base alone, or one read of "
        "the file, one write of it, one pass over the numbers. Milliseconds of one run by kind; "
        "the profiler slows what it watches.",
        "",
    ]
    for row in missed:
        lines += [f"**{row['id']}**, {row['metric']}: {_cell(row['ratio'])}, asked {row['must']}. "
                  + _reach(row), ""]  # fmt: skip
        if row["profile"]:
            lines += [f"| | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
            for name, held in row["profile"].items():
                lines.append(f"| {name} | {' | '.join(_cell(held[kind]) for kind in KINDS)} |")
            lines.append("")
    return lines


def _reach(row: Mapping[str, Any]) -> str:
    """How far from its floor a miss is, and whether the floor itself would hold the bound."""
    floor, ours, bound = row["floor"], row["ours"], float(row["must"].split()[1])
    remark = REMARKS.get(row["id"], "")
    if not floor:
        return remark
    ours_over = f"Ours takes {ours / floor:.3g} of the floor. {remark}".strip()
    if not row["must"].startswith(">="):
        return ours_over
    gain = row["peer"] / floor
    reach = f"The floor itself gains {gain:.3g} over the peer"
    return reach + (", less than is asked. " if gain < bound else ". ") + ours_over


def _grown() -> bool:
    return RESULTS.joinpath("growth.md").exists()


def _measured_on(measured_on: dict[str, Any], dtype: str) -> str:
    machine = measured_on["machine"]
    speeds = machine["gflops_of_1024_products"].items()
    speed = ", ".join(f"{number} in {name}" for name, number in speeds)
    return (
        f"{machine['processor']}, {machine['threads']} thread of {machine['cores']} cores "
        "(where loads are measured, one for each), "
        f"{'with' if machine['amx'] else 'without'} AMX. Products of 1024: {speed} GFLOP/s. "
        + ", ".join(f"{name} {text}" for name, text in measured_on["versions"].items())
        + f". Backbones in {dtype}. Contenders take turns in one process; the shortest of at "
        "least 7 rounds counts. Made by `make bench`."
    )


if __name__ == "__main__":
    raise SystemExit(main())
