"""Normal forms and hashes of text: what makes two rows the same row."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any

__all__ = ["digest", "fraction", "normalise"]


def normalise(text: str) -> str:
    """Returns `text` in NFKC, case-folded, with each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(*parts: Any) -> str:
    """Returns 16 hexadecimal digits that depend on the content of `parts` alone (BLAKE2b of their
    JSON).

    Strings, numbers, booleans, None, lists, tuples and mappings of them are allowed.
    """
    content = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def fraction(*parts: Any) -> float:
    """Returns a number in [0, 1) that depends on `parts` alone, uniform over different parts."""
    return int(digest(*parts), 16) / 2.0**64
