"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from deltatune.core.errors import StateError

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], content: bytes, what: str) -> Path:
    """Writes a file beside its place first, and returns where it is then.

    Args:
        path: of the file.
        content: its bytes.
        what: it is, as the error calls it.

    Raises StateError if it cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StateError(
            f"Cannot write the {what} {target}: {error.strerror}. Give a file in a folder that can"
            " be written."
        ) from error
    return target
