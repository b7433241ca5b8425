"""Walks 10,000 random sequences of transitions (tests/core/test_states.py).

In ten parts, each with a seed of its own; a part that passed with this code is not walked again:
`build/fuzz.jsonl` keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from deltatune.study.source import code_version

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "build" / "fuzz.jsonl", ROOT / "docs" / "results" / "states.md"
WALK = ROOT / "tests" / "core" / "test_states.py"
PARTS, SEQUENCES = 10, 1000


def main() -> int:
    """Walks what is missing; the exit code says whether every sequence agreed."""
    KEPT.parent.mkdir(exist_ok=True)
    version = code_version() + hashlib.sha256(WALK.read_bytes()).hexdigest()[:12]
    kept = map(json.loads, KEPT.open()) if KEPT.exists() else ()
    seconds = {one["part"]: one["seconds"] for one in kept if one["version"] == version}
    for part in range(PARTS):
        if part in seconds:
            continue
        started = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", str(WALK), f"--hypothesis-seed={part}"]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "DELTATUNE_SEQUENCES": str(SEQUENCES)}
        )
        if run.returncode:
            return 1
        seconds[part] = round(time.perf_counter() - started)
        with KEPT.open("a") as file:
            line = {"version": version, "part": part, "seconds": seconds[part]}
            print(json.dumps(line), file=file)
    PAGE.write_text(
        "# States\n\n"
        f"{PARTS * SEQUENCES:,} random sequences of up to 15 transitions (attach, switch, freeze, "
        "merge, unmerge, route,\ntrain, save, load, detach; legal ones and others) on up to four "
        "deltas, each compared after every step\nwith a reference that computes every row by "
        "itself: logits, gradients, status, the backbone's bytes.\nNone differed. Made by "
        f"`make fuzz` in {sum(seconds.values()):,} seconds on one core.\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
