"""How a delta in a hub is named: `name`, `name:tag` or `name@sha256:digest`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltatune.core.errors import ConfigurationError

__all__ = ["DIGEST", "LATEST", "Reference"]

LATEST = "latest"
# Lower case, so that no two names are one file on a disk that does not tell cases apart; no part
# begins with a point, so that none leads out of its folder.
_PART = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART}){{0,7}}")
_TAG = re.compile(_PART)
DIGEST = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class Reference:
    """What one delta of a hub is called.

    Attributes:
        name: parts of lower-case letters, digits and ". _ -" with "/" between, "glue/trec-lora".
        tag: which version of it; None where a digest says so.
        digest: SHA-256 of its `delta.json`, hexadecimal; None where a tag says so.
    """

    name: str
    tag: str | None = LATEST
    digest: str | None = None

    def __post_init__(self) -> None:
        version = re.fullmatch(DIGEST, self.digest or "") if self.tag is None else None
        if self.tag is not None and self.digest is None:
            version = _TAG.fullmatch(self.tag)
        if _NAME.fullmatch(self.name) is None or version is None:
            raise ConfigurationError(
                "A delta is named 'name', 'name:tag' or 'name@sha256:' and 64 hexadecimal digits, "
                "where names and tags are lower-case letters, digits and '.', '_', '-' within, "
                f"'glue/trec-lora:v1'. Found {str(self)!r}."
            )

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads one. Raises ConfigurationError."""
        name, at, digest = text.partition("@")
        if at:
            kind, _, value = digest.partition(":")
            return cls(name, None, value if kind == "sha256" else digest)
        name, colon, tag = text.partition(":")
        return cls(name, tag if colon else LATEST)

    def __str__(self) -> str:
        return (
            f"{self.name}@sha256:{self.digest}" if self.tag is None else f"{self.name}:{self.tag}"
        )
