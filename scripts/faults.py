"""Runs every row of `tests/faults`; writes the table of silent faults, and its part of README."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.faults import FAULTS, Fault  # noqa: E402

PAGE, README = ROOT / "docs" / "results" / "faults.md", ROOT / "README.md"
BEGIN, END = "<!-- made by `make faults` -->\n", "<!-- end of what `make faults` made -->"
HEAD = "| | deltatune | PEFT 0.21 | adapters 1.2 | OpenDelta 0.3 |\n|---|---|---|---|---|\n"
IN_README = (
    "prompt_on_t5",
    "every_attention_of_t5",
    "bottleneck_adapters",
    "specification",
    "two_methods",
    "mixed_batch",
    "other_weights",
    "changed_value",
    "half_a_target",
    "frozen_head",
    "merge_drift",
    "taken_off",
    "counts_without_weights",
)
ABOUT = """# Silent faults

What goes wrong without a word elsewhere, and what happens here. Each line is a test that does it
(`tests/faults`); a star marks what the same test does with the installed PEFT (mixed batches: with
prompt tuning). The other cells are notes of runs of PEFT 0.21.2 on transformers 5.23, of `adapters`
1.2 on transformers 4.57.6, and of OpenDelta 0.3.2, which no longer imports on current libraries
without shims. – stands for what was not run, or does not exist there. Made by `make faults`.

"""


def line(fault: Fault, ours: str) -> str:
    """A row of the table."""
    peft = fault.peft + (" *" if fault.on_peft is not None else "")
    return f"| {fault.title} | {ours} | {peft} | {fault.adapters} | {fault.opendelta} |"


def main() -> None:
    """Runs all rows, which fail loudly, and writes both tables."""
    rows = {}
    for name, fault in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = line(fault, fault.ours(Path(folder)))
    PAGE.write_text(ABOUT + HEAD + "\n".join(rows.values()) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    chosen = "\n".join(rows[name] for name in IN_README)
    README.write_text(f"{before}{HEAD}{chosen}\n{after}", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
