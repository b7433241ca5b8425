"""Runs the studies of benchmarks/studies, each shared by two processes of one thread.

    DELTATUNE_DATA=... python scripts/studies.py [NAME ...]

A study goes on where it stopped: runs/NAME begins with the cells that are kept in
benchmarks/studies/NAME.jsonl.gz. When one stops, finished or not, its cells are kept there again. A
finished one leaves its report in docs/results/studies.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from deltatune.study.findings import findings, write_findings
from deltatune.study.status import status
from deltatune.study.store import open_study

ROOT = Path(__file__).resolve().parent.parent
KEPT, REPORTS = ROOT / "benchmarks" / "studies", ROOT / "docs" / "results" / "studies"
STUDIES = (
    "performance",
    "convergence",
    "text_to_text",
    "efficiency",
    "zero-shot",
    "combination",
    "templates",
    "sequence",
    "gap",
    "scale",
    "transfer",
    "size",
    "review",
    "forgetting",
)
# The experiment of a study, and whose file and cells it takes, where these are not of its name.
EXPERIMENT = {"text_to_text": "performance", "templates": "combination"}
SETTINGS = {"convergence": "performance"}
PROCESSES = 2
TEXTS = "_corpus/wikipedia_en_validation.jsonl.gz"  # of no task, below DELTATUNE_DATA


def main() -> int:
    """Runs what is left of the studies that are named; the exit code says whether all ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(STUDIES))
    names = parser.parse_args().names or STUDIES
    for name in names:
        if name not in STUDIES:
            parser.error(f"{name!r} is none of {', '.join(STUDIES)}")
    if "DELTATUNE_DATA" not in os.environ:
        parser.error("set DELTATUNE_DATA to the folder of task data")
    os.environ["DELTATUNE_DATA"] = str(Path(os.environ["DELTATUNE_DATA"]).resolve())
    os.chdir(ROOT)  # cells name their deltas relative to it, and the report of transfer reads them
    return max(map(run, names))


def run(name: str) -> int:
    """Runs one study to its end; what is done is kept in any case."""
    folder = ROOT / "runs" / name
    begin(name, folder)
    print(
        f"{name}: `deltatune study watch {folder.relative_to(ROOT)}` shows how far it is",
        flush=True,
    )
    processes = [start(name, folder, number) for number in range(PROCESSES)]
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.terminate()
            process.wait()
        keep(name, folder)
    store = open_study(folder)
    if not status(store).ended:  # else cells may have failed, which is in the report
        print(f"{name}: not finished; {folder.relative_to(ROOT)}/process-*.log say why", flush=True)
        return 1
    REPORTS.mkdir(exist_ok=True)
    write_findings(findings(store), REPORTS / f"{name}.html")
    return 0


def begin(name: str, folder: Path) -> None:
    """Gives a study that has no folder yet the cells that are kept of it, or of the one whose
    settings it has.
    """
    if (folder / "journal.jsonl").exists():
        return
    own, other = (KEPT / f"{one}.jsonl.gz" for one in (name, SETTINGS.get(name, name)))
    kept = own if own.exists() else other
    lines = gzip.decompress(kept.read_bytes()).decode().splitlines(True) if kept.exists() else []
    if kept != own:  # the other study's plan is not this one's
        lines = [line for line in lines if json.loads(line)["kind"] != "note"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(lines))


def start(name: str, folder: Path, number: int) -> subprocess.Popen[bytes]:
    """Starts one of the processes of a study; what it prints goes to a file beside the journal."""
    texts = ROOT / "runs" / "texts.jsonl.gz"
    if name == "forgetting" and not texts.exists():
        texts.symlink_to(Path(os.environ["DELTATUNE_DATA"]).resolve() / TEXTS)
    # Paths are relative: they are in the cells.
    more = (
        ["--set", f"options.general_text={texts.relative_to(ROOT)}"] if name == "forgetting" else []
    )
    settings = KEPT.relative_to(ROOT) / f"{SETTINGS.get(name, name)}.yaml"
    command = [
        sys.executable, "-m", "deltatune", "study", EXPERIMENT.get(name, name),
        "--config", str(settings), "--out", str(folder.relative_to(ROOT)), *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"process-{number}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def keep(name: str, folder: Path) -> None:
    """Keeps the journal of a study, without the names of the processes that wrote it."""
    journal = (folder / "journal.jsonl").read_text()
    journal = re.sub(r'"writer":"[^"]*"', '"writer":"first:1"', journal)
    (KEPT / f"{name}.jsonl.gz").write_bytes(gzip.compress(journal.encode(), 9, mtime=0))


if __name__ == "__main__":
    raise SystemExit(main())
