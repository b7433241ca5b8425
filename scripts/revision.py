"""The revision that a result is made at."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["revision"]

ROOT = Path(__file__).resolve().parent.parent


def revision() -> str:
    """The commit that is checked out, in short; "unknown" without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
