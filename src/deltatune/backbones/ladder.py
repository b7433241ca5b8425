"""The pretrained backbones that travel with the package: a ladder of three T5 sizes.

All three were trained by `scripts/pretrain.py` on the same tokens in the same order, so that scale
can be studied; each folder's `CARD.md` holds data, recipe and loss curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.core.registry import Registry

if TYPE_CHECKING:
    from deltatune.backbones.load import Backbone

__all__ = ["EMBEDDED", "TOKENIZER", "embedded"]

_WEIGHTS = Path(__file__).parent / "weights"

TOKENIZER = _WEIGHTS / "tokenizer"
"""The folder of the one tokenizer that the ladder shares."""

EMBEDDED: Registry[Path] = Registry("embedded backbone")
"""Name to folder, the smallest first when sorted by size: t5-nano, t5-micro, t5-mini."""

for _name in ("t5-nano", "t5-micro", "t5-mini"):
    EMBEDDED.add(_name, _WEIGHTS / _name)


def embedded(name: str) -> Backbone:
    """Loads an embedded backbone, in fp32, without network.

    Raises:
        UnknownNameError: no embedded backbone has this name.
    """
    # Imported late: `load` needs transformers, and the list of names must cost nothing.
    from deltatune.backbones.load import load_backbone

    EMBEDDED[name]
    return load_backbone(name)
