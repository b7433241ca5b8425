"""`python -m deltatune` is the command `deltatune`."""

from __future__ import annotations

from deltatune.cli import main

main()
