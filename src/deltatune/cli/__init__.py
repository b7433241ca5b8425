"""The command line: one file per command, each a thin call of the package.

Nothing heavy is imported before a command runs, so that `deltatune --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 if all is well, 2 for an error that the user can mend.

    Args:
        arguments: the words after `deltatune`; None for those of the process.
    """
    from deltatune.cli.app import build
    from deltatune.core.errors import DeltatuneError

    try:
        words = None if arguments is None else list(arguments)
        build()(args=words, prog_name="deltatune")
    except DeltatuneError as error:
        print(f"deltatune: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
