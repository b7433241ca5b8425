"""The licence of a backbone, as the card beside its weights names it."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils.hub import cached_file

from deltatune.backbones.ladder import EMBEDDED
from deltatune.backbones.load import Backbone, locate

__all__ = ["licence_of"]

_OURS = "apache-2.0"


def licence_of(backbone: Backbone) -> str | None:
    """The identifier of the licence ("apache-2.0"); None where no card at hand says it.

    Looks at the folder that the backbone came from, for a hub id at what is in the cache; fetches
    nothing.
    """
    if backbone.name in EMBEDDED:
        return _OURS
    place = locate(backbone.name, None)
    try:
        if place.from_hub:
            card = cached_file(
                place.model, "README.md", revision=backbone.revision, local_files_only=True
            )
        else:
            card = str(Path(place.model) / "README.md")
        said = (metadata_load(card) or {}).get("license") if card else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) else None
