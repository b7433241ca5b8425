"""Backbones: what models call things, how they store them, and the seams of their sequences.

`deltatune.backbones.embedded("t5-mini")` loads a pretrained backbone that travels with the package.
"""

from deltatune.backbones import roles, storage, virtual_tokens
from deltatune.backbones.ladder import embedded

__all__ = ["embedded", "roles", "storage", "virtual_tokens"]
