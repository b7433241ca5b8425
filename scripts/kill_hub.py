"""Eight processes that push and pull 200 deltas on one hub and are killed; writes its page."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from revision import revision  # noqa: E402
from tests.hub.killing import play  # noqa: E402

PAGE = ROOT / "docs" / "results" / "kill-hub.md"
PROCESSES, DELTAS, ROUNDS = 8, 200, 100


def main() -> None:
    """Plays all rounds; one that does not hold ends it with an error."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = play(Path(folder), processes=PROCESSES, deltas=DELTAS, rounds=ROUNDS)
    seconds = time.perf_counter() - started
    PAGE.write_text(
        f"""# Kills on a hub

{PROCESSES} processes push and pull {DELTAS} deltas on one hub and share one store of pulled ones,
until all of them are killed (SIGKILL) at random moments; {ROUNDS} rounds on the same hub.

| | |
|---|---:|
| kills | {tally.kills:,} |
| visible deltas fetched and verified after the rounds | {tally.verified:,} |
| pulled deltas in the store, read again after the rounds | {tally.stored:,} |
| files that killed processes left, which `tidy` took | {tally.left:,} |
| seconds | {seconds:,.0f} |

Every delta that could be seen was whole, each time. In the end all {DELTAS} were pushed again over
what was left, and verified.

Made by `make kill` at revision {revision()}; `make test` plays eight rounds with four processes.
""",
        encoding="utf-8",
    )
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
