"""Files that come from anywhere, checked before anything in them is believed.

What is read is a regular file (a link to one, too): a pipe or a device would never end. JSON says
no key twice, since two programs would take it for two things. The header of a file of tensors is
of a bounded size, and all sizes in it are held to the file by safetensors. A regular expression has
so much time and no more.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import regex
from safetensors import safe_open

__all__ = ["LARGEST_JSON", "Pattern", "content_of", "json_of", "size_of", "tensors_of"]

LARGEST_JSON = 64 << 20  # bytes; the description of a delta of a million tensors
_SECONDS = 0.25  # for one name of a module; microseconds are what it takes


def size_of(path: Path) -> int:
    """The size of a regular file, in bytes. Raises OSError where there is none."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no regular file")
    return found.st_size


def content_of(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """What a file holds. Raises OSError where it is none, and ValueError if it has more bytes."""
    if size_of(path) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    with path.open("rb") as file:
        return file.read(largest)


def json_of(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError, for a key that is there twice, too."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def tensors_of(path: Path) -> Any:
    """A file of safetensors, opened; a context, as `safe_open` is.

    Raises:
        OSError: there is no such file.
        ValueError: its header is too large, no JSON, or names a tensor twice.
        SafetensorError: it is damaged.
    """
    size_of(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_JSON:
            raise ValueError(f"its header has more than {LARGEST_JSON:,} bytes")
        json_of(file.read(size))
    return safe_open(path, "pt")


class Pattern:
    """A regular expression in the syntax of `re`, which gives up where it would take for ever.

    Args:
        text: the expression.

    Raises ValueError if it is none.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            re.compile(text)
            self._compiled = regex.compile(text)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{text[:80]!r} is no regular expression: {error}") from None

    def match(self, name: str, *, whole: bool = True) -> re.Match[str] | None:
        """The match of all of `name`, or of its beginning; None for none.

        Raises ValueError where it takes too long.
        """
        ask = self._compiled.fullmatch if whole else self._compiled.match
        try:
            found: re.Match[str] | None = ask(name, timeout=_SECONDS)
        except TimeoutError:
            raise ValueError(
                f"{self.text[:80]!r} takes too long on {name[:80]!r}: it tries without end"
            ) from None
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} is there twice")
        found[name] = value
    return found
