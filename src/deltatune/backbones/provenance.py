"""What is known of a backbone beside its weights: its licence, the digests of its files, and the
names of what it was trained on.

Only what is at hand is looked at: the folder that it came from, or the cache of the Hugging Face
Hub. Nothing is fetched, and no large file is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils.hub import cached_file

from deltatune.backbones.ladder import EMBEDDED
from deltatune.backbones.load import Backbone, locate
from deltatune.core.untrusted import content_of, json_of

__all__ = ["corpora_of", "digests_of", "licence_of"]

_OURS = "apache-2.0"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def licence_of(backbone: Backbone) -> str | None:
    """The identifier of the licence ("apache-2.0"); None where no card at hand names one."""
    if backbone.name in EMBEDDED:
        return _OURS
    card = _file(backbone, "README.md")
    try:
        said = (metadata_load(card) or {}).get("license") if card is not None else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) else None


def digests_of(backbone: Backbone) -> dict[str, str]:
    """Names of files of weights to their SHA-256, as the Hub gave them: its cache keeps large files
    under their digests. Empty for what is not from the Hub.
    """
    config = _file(backbone, "config.json") if backbone.revision is not None else None
    if config is None:
        return {}
    found = {path.name: path.resolve().name for path in sorted(config.parent.glob("*.safetensors"))}
    return {name: digest for name, digest in found.items() if _SHA256.fullmatch(digest)}


def corpora_of(backbone: Backbone) -> tuple[str, ...]:
    """The files that a model of sentence-transformers was trained on, without their endings, as its
    `data_config.json` lists them; empty where there is no such list.
    """
    path = _file(backbone, "data_config.json")
    try:
        listed = [] if path is None else json_of(content_of(path))
    except (OSError, ValueError):
        return ()
    files = listed if isinstance(listed, list) else []
    names = [str(file["name"]) for file in files if isinstance(file, dict) and "name" in file]
    return tuple(name.partition(".jsonl")[0] for name in names)


def _file(backbone: Backbone, name: str) -> Path | None:
    """A file of a backbone that is on this machine."""
    place = locate(backbone.name, None)
    if not place.from_hub:
        path = Path(place.model) / name
        return path if path.is_file() else None
    try:
        found = cached_file(place.model, name, revision=backbone.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
