"""Gives the readers of files a million spoilt ones (tests/fuzzing), and writes what came out.

In blocks of a thousand, each with draws of its own; a block that was done with this code is not
done again: `build/fuzz-readers.jsonl` keeps it. What went wrong is kept in tests/fuzzed, where
tests/test_fuzz.py gives it to its reader again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from revision import revision  # noqa: E402
from tests.fuzzing.engine import ROOM, execute, limited  # noqa: E402
from tests.fuzzing.readers import READERS  # noqa: E402

KEPT, PAGE = ROOT / "build" / "fuzz-readers.jsonl", ROOT / "docs" / "results" / "fuzz.md"
CRASHES = ROOT / "tests" / "fuzzed"
ALL, BLOCK, SEED = 1_000_000, 1_000, 0
BOUND = 1 << 30  # bytes that the process may hold at most


def main() -> int:
    """Does what is missing; the exit code says whether all went well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--executions", type=int, default=ALL, help="of all readers together")
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    KEPT.parent.mkdir(exist_ok=True)
    version = _version()
    with limited():
        for name in arguments.reader or READERS:
            _execute(name, round(arguments.executions * READERS[name].share), version)
    lines = [line for line in _lines(version) if line["reader"] in READERS]
    if lines:
        PAGE.write_text(_page(lines), encoding="utf-8")
    crashes = sum(sum(line["crashes"].values()) for line in lines)
    peak = max((line["peak"] for line in lines), default=0)
    print(f"{sum(line['executions'] for line in lines):,} executions, {crashes:,} crashes")
    return int(crashes > 0 or peak > BOUND)


def _execute(name: str, count: int, version: str) -> None:
    """The blocks of one reader that are not in the journal."""
    done = {line["first"] for line in _lines(version) if line["reader"] == name}
    for first in range(0, count, BLOCK):
        if first in done:
            continue
        found = execute(READERS[name], first, BLOCK, seed=SEED, kept=CRASHES)
        line = {"version": version, "reader": name, "first": first, **asdict(found)}
        with KEPT.open("a") as file:
            print(json.dumps(line), file=file)
        for kind, times in found.crashes.items():
            print(f"{times} × {kind}", flush=True)


def _lines(version: str) -> list[dict[str, Any]]:
    """What the journal holds of this code; a line that a killed process left half is none."""
    found = []
    for text in KEPT.read_text().splitlines() if KEPT.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["version"] == version:
            found.append(line)
    return found


def _version() -> str:
    """A digest of the library, and of what spoils and reads."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests" / "fuzzing").glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def _page(lines: list[dict[str, Any]]) -> str:
    """The page of the results."""
    rows, seconds = [], sum(line["seconds"] for line in lines)
    for name in READERS:
        own = [line for line in lines if line["reader"] == name]
        count, spent = (sum(line[key] for line in own) for key in ("executions", "seconds"))
        crashes = sum(sum(line["crashes"].values()) for line in own)
        accepted = sum(line["accepted"] for line in own)
        rate = count / max(spent, 1e-9)
        rows.append(f"| {name} | {count:,} | {accepted:,} | {crashes:,} | {rate:,.0f} |\n")
    peak, count = max(line["peak"] for line in lines), sum(line["executions"] for line in lines)
    return f"""# Spoilt files

{count:,} files and folders, spoilt in their bytes, in their JSON (keys twice, numbers without end,
depth), in their tensors (types, shapes of terabytes, NaN), in their names (paths that lead out,
other cases) and in what they are (links, pipes, folders), each given to the reader that it is for.
A crash is an error that is none of `DeltatuneError`, more than ten seconds, a change outside of the
folder, a socket, a process, a pickle, or an import that the file asked for. What a reader took was
still sound, or sound again. The hub's executions go on after each refusal: all of them end well.

| reader | executions | read as something | crashes | a second of one core |
|---|---:|---:|---:|---:|
{"".join(rows)}
The process held at most {peak / 2**20:,.0f} MiB, with PyTorch and the readers' models in it; it may
ask for {ROOM >> 30} GiB more than it begins with, and is held to {BOUND >> 20:,} MiB in all.
Seed {SEED}. Made by `make fuzz` at revision {revision()} in {seconds:,.0f} seconds of one core.
"""


if __name__ == "__main__":
    raise SystemExit(main())
