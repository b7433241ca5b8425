"""Backbones: what models call things, how they store them, and the seams of their sequences.

`deltatune.backbones.embedded("t5-mini")` loads a pretrained backbone that travels with the package.
"""

from deltatune.backbones import bits_and_bytes, int8, roles, storage, torch_ao, virtual_tokens
from deltatune.backbones.ladder import embedded
from deltatune.backbones.quantising import quantise

__all__ = [
    "bits_and_bytes",
    "embedded",
    "int8",
    "quantise",
    "roles",
    "storage",
    "torch_ao",
    "virtual_tokens",
]
