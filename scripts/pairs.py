"""Attaches every ordered pair of methods, and writes what becomes of it: docs/results/pairs.md.

A pair that was tried with this code and these libraries is not tried again: `build/pairs.jsonl`
keeps it. All of them take half an hour on one core.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from revision import revision
from rich.console import Console

from deltatune.core.card import find_card
from deltatune.core.grammar import parse
from deltatune.study.source import code_version
from deltatune.testing.pairs import MERGED, SUMMED, pair

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KEPT, PAGE = ROOT / "build" / "pairs.jsonl", ROOT / "docs" / "results" / "pairs.md"
FAMILY = "bert"
SIGNS = {MERGED: "●", SUMMED: "○"}


def tried(first: str, second: str) -> tuple[str, str | None]:
    """What became of a pair, and what it broke."""
    try:
        return pair(first, second, FAMILY), None
    except Exception as error:  # every kind of failure is a cell of the table
        return "broken", f"{type(error).__name__}: {str(error).splitlines()[:1]}"


def main() -> int:
    """Tries what is missing, writes the page; the exit code says whether all promises hold."""
    from tests.methods.test_conformance import METHODS

    KEPT.parent.mkdir(exist_ok=True)
    kept = {}
    if KEPT.exists():
        kept = {entry["key"]: entry["found"] for entry in map(json.loads, KEPT.open())}
    law = hashlib.sha256((ROOT / "src/deltatune/testing/pairs.py").read_bytes()).hexdigest()[:12]
    single: dict[str, str] = {}
    for text in METHODS:  # the first setting of each method
        if len(parse(text).methods) == 1 and parse(text).methods[0].strength == 1:
            single.setdefault(parse(text).methods[0].name, text)
    console, table, failures = Console(), dict[tuple[str, str], str](), list[str]()
    for one, first in sorted(single.items()):
        for other, second in sorted(single.items()):
            key = f"{code_version(tuple(sorted({one, other})))} {law} {first} {second}"
            found, error = (kept[key], None) if key in kept else tried(first, second)
            table[one, other] = found
            if error is not None:
                failures.append(f"{first} + {second}: {error}")
            elif key not in kept:
                with KEPT.open("a") as file:
                    print(json.dumps({"key": key, "found": found}), file=file)
        counts = Counter(SIGNS.get(table[one, other], "refused") for other in single)
        console.print(one, dict(counts), markup=False)
    PAGE.write_text(page(table, sorted(single)), encoding="utf-8")
    console.print(*failures, sep="\n", markup=False)
    return 1 if failures else 0


def page(table: dict[tuple[str, str], str], names: list[str]) -> str:
    """The matrix, and the sentences of the refusals."""
    notes: dict[str, int] = {}
    rows = []
    for one in names:
        cells = []
        for other in names:
            found = table[one, other]
            cells.append(SIGNS.get(found) or f"[{notes.setdefault(found, len(notes) + 1)}]")
        rows.append(f"| `{one}` | {' | '.join(cells)} |")
    counts = Counter(table.values())
    refused = counts.total() - counts[MERGED] - counts[SUMMED]
    both = sum(find_card(a).mergeable and find_card(b).mergeable for a in names for b in names)
    return "\n".join(
        [
            "# Pairs of methods",
            "",
            f"Every ordered pair of {len(names)} methods, attached as one expression to the "
            f"miniature {FAMILY} of the conformance suite, by `make pairs`. In each pair both "
            "parts act and get gradients, and one artefact holds both.",
            "",
            f"- {SIGNS[MERGED]} written into the weights, the output is the same, and undone to "
            f"the bit: {counts[MERGED]} pairs, of {both} in which both methods merge.",
            f"- {SIGNS[SUMMED]} a part acts on activations, or merging is refused: "
            f"{counts[SUMMED]} pairs.",
            f"- [n] refused, with the sentence below: {refused} pairs.",
            "",
            f"Made at revision {revision()}.",
            "",
            f"| first | {' | '.join(f'`{name}`' for name in names)} |",
            f"|---|{'---|' * len(names)}",
            *rows,
            "",
            *(f"[{number}] {sentence}\n" for sentence, number in notes.items()),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
