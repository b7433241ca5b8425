"""Runs the conformance suite and writes its matrix: methods down, families across, laws passed.

A cell that passed with this code, these laws and these libraries is not run again:
`build/matrix.jsonl` keeps it. All together take an hour and a half of one core. With --families and
--methods it runs and prints a part and writes no page; several processes can share the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from revision import revision
from rich.console import Console

from deltatune import api
from deltatune.core.errors import TargetError, UnsupportedError
from deltatune.core.grammar import parse
from deltatune.study.source import code_version
from deltatune.testing.families import FAMILIES
from deltatune.testing.methods import Case, laws

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tracing takes longer than all other laws together: one method of every face, and all of them.
TRACED = ("lora(rank=3)", "adapter(bottleneck=4)", "bitfit", "prompt(length=3)", "prefix(length=3)")
KEPT, PAGE = ROOT / "build" / "matrix.jsonl", ROOT / "docs" / "results" / "conformance.md"


def run(case: Case) -> tuple[int, list[str]]:
    """How many laws hold, and the names and errors of those that do not."""
    broken, held = [], laws(slow=_traced(case.method))
    for law in held:
        with tempfile.TemporaryDirectory() as folder:
            try:
                law(case, Path(folder))
            except Exception as error:  # every kind of failure is a cell of the table
                broken.append(f"{law.__name__}: {str(error).splitlines()[:1]}")
    return len(held) - len(broken), broken


def _refusal(case: Case) -> str | None:
    """Why a family does not take a method; None if it does."""
    if case.lacks:
        return case.refusal()
    try:
        api.plan(case.model(), case.expression)
    except (TargetError, UnsupportedError) as error:
        return str(error).split(" Roles here")[0]
    return None


def _traced(method: str) -> bool:
    return method in TRACED or len(parse(method).methods) > 1


def kept() -> dict[str, int]:
    """Cells that passed already."""
    if not KEPT.exists():
        return {}
    return {entry["key"]: entry["passed"] for entry in map(json.loads, KEPT.open())}


def _wanted() -> tuple[list[str], list[str], bool]:
    """The settings of methods and the families that are asked for, and whether that is all."""
    from tests.methods.test_conformance import METHODS

    parser = argparse.ArgumentParser()
    parser.add_argument("--families", help="names with commas; else all")
    parser.add_argument("--methods", help="names with commas; else all")
    chosen = parser.parse_args()
    families = chosen.families.split(",") if chosen.families else list(FAMILIES)
    names = set(chosen.methods.split(",")) if chosen.methods else None
    methods = [text for text in METHODS if names is None or {m.name for m in parse(text)} <= names]
    return methods, families, chosen.families is None and names is None


def main() -> int:
    """Runs what is missing, prints the table, and says by its exit code whether all laws hold."""
    methods, families, whole = _wanted()
    console, done, failures = Console(), kept(), []
    KEPT.parent.mkdir(exist_ok=True)
    table: dict[str, dict[str, str]] = {}
    refusals: dict[str, int] = {}
    for method in methods:
        used = tuple(sorted({one.name for one in parse(method)}))
        for family in families:
            key = f"{code_version(used)} {_law_version()} {method} {family}"
            case = Case(method, family)
            if (refusal := _refusal(case)) is not None:
                refusals.setdefault(refusal, len(refusals) + 1)
                table.setdefault(method, {})[family] = f"refused [{refusals[refusal]}]"
                continue
            if key not in done:
                done[key], broken = run(case)
                failures += [f"{method} on {family}: {line}" for line in broken]
                if not broken:
                    with KEPT.open("a") as file:
                        print(json.dumps({"key": key, "passed": done[key]}), file=file)
            cell = f"{done[key]}/{len(laws(slow=_traced(method)))}"
            table.setdefault(method, {})[family] = cell
            console.print(f"{method} on {family}: {cell}")
    page = _page(table, families, refusals)
    if whole:
        PAGE.write_text(page)
    console.print(page, *failures, sep="\n", markup=False)
    return 1 if failures else 0


def _law_version() -> str:
    """A digest of the laws and of the miniature models."""
    files = sorted((ROOT / "src" / "deltatune" / "testing").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _faces(method: str) -> str:
    """The faces of a method, or of a composition."""
    return ", ".join(dict.fromkeys("none" if m.in_place else m.face for m in parse(method)))


def _page(
    table: dict[str, dict[str, str]], families: Sequence[str], refusals: dict[str, int]
) -> str:
    rows = [
        f"| `{method}` | {_faces(method)} | {' | '.join(row.values())} |"
        for method, row in table.items()
    ]
    notes = [f"[{number}] {sentence}" for sentence, number in refusals.items()]
    named = ", ".join(law.__name__.removeprefix("law_") for law in laws())
    shared = " and ".join(family.name for family in FAMILIES.values() if family.shares)
    head = f"| method | face | {' | '.join(families)} |"
    return "\n".join(
        [
            "# Conformance",
            "",
            f"Laws that hold, of {len(laws())} ({named}), for every method on every family in "
            "miniature.",
            "Every law runs in fp32; `bfloat16` and `float16` are laws of their own. One method of "
            "every face, and all",
            "faces together, are held to one more, `compiled`: one graph (`fullgraph=True`) traced "
            "before the delta",
            f"came, with its gradients. In {shared} something is computed",
            "once for all rows of a batch; `slots` accepts there that a site refuses several "
            "slots in one batch.",
            f"Made by `make matrix` at revision {revision()}.",
            "",
            head,
            "|" + "---|" * (len(families) + 2),
            *rows,
            "",
            *notes,
            *([""] if notes else []),
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
