"""Plays 200 rounds of the kill test (tests/study/killing.py); writes its page.

A round that passed with this code is not played again: `build/kill.jsonl` keeps what it did. With
--rounds so many are played and counted, and nothing is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.study.killing import Round, Tally  # noqa: E402

BUILD, PAGE = ROOT / "build", ROOT / "docs" / "results" / "kill.md"
KEPT = BUILD / "kill.jsonl"
ROUNDS = 200
TESTED = ("src/deltatune/study/store.py", "src/deltatune/study/runner.py", "tests/study/killing.py")


def version() -> str:
    """A digest of what is tested and of the test."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in TESTED)).hexdigest()[:12]


def kept() -> dict[int, Tally]:
    """What the rounds did that passed with this code."""
    lines = map(json.loads, KEPT.open()) if KEPT.exists() else ()
    return {line["round"]: Tally(**line["tally"]) for line in lines if line["version"] == version()}


def play(number: int, parent: Path) -> Tally:
    """Plays a round and says what it did; the folder of one that fails stays."""
    folder = parent / f"round-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    tally = Round(number, folder).play()
    shutil.rmtree(folder)
    print(
        f"round {number}: {tally.cells} cells, {tally.executions} executions by"
        f" {tally.processes} processes, {tally.kills} killed, {tally.seconds:.1f} s",
        flush=True,
    )
    return tally


def main() -> None:
    """Plays what is missing; the first round that does not hold ends it with an error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="so many, and no page")
    rounds = parser.parse_args().rounds
    if rounds is not None:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(rounds):
                play(number, Path(folder))
        return
    done = kept()
    BUILD.mkdir(exist_ok=True)
    for number in range(ROUNDS):
        if number in done:
            continue
        done[number] = play(number, BUILD)
        line = {"version": version(), "round": number, "tally": asdict(done[number])}
        with KEPT.open("a") as file:
            print(json.dumps(line), file=file)
    PAGE.write_text(page(list(done.values())), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def page(tallies: list[Tally]) -> str:
    """The page of the results."""
    whole = {name: sum(getattr(one, name) for one in tallies) for name in asdict(tallies[0])}
    command = ["git", "log", "-1", "--format=%h", "--", *TESTED]
    revision = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return f"""# Kills

Studies whose processes are killed (SIGKILL) while they work. In each round two, three or four
processes share one journal through `study.runner.run`: cells of 2 to 50 ms, some that fail, some
run in groups. They are killed at random moments, when the journal has just grown, and in the middle
of a line that they write. Most are replaced at once; in the end as many are started again and left
alone.

| | |
|---|---:|
| rounds | {len(tallies):,} |
| cells, of which failed | {whole["cells"]:,}, {whole["failed"]:,} |
| processes started | {whole["processes"]:,} |
| kills, of which in the middle of a line | {whole["kills"]:,}, {whole["torn"]:,} |
| executions of cells, of which cut off by a kill | {whole["executions"]:,}, \
{whole["executions"] - whole["cells"]:,} |
| seconds on one busy core | {whole["seconds"]:,.0f} |

After each round: every cell has exactly one record; every line of the journal is whole; results
(in which it shows with whom a cell was run) and errors are those of an uninterrupted run, in the
store and in what each process returned; no cell was run after it was recorded, nor a second time
without a kill (every execution is counted in a file of its own); all claims are free; and who read
the journal all the while saw whole records only. All rounds held.

Made by `make kill` at revision {revision or "unknown"}; `make test` plays three rounds.
"""


if __name__ == "__main__":
    main()
