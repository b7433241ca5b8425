"""Model cards: what a person wants to know of an artefact, as the page `card.md` beside it.

The page is made of `delta.json`, which vouches for itself, and of what differs from run to run
(time, memory) and would give every run a digest of its own. Nothing reads it back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deltatune.core.description import Artefact
from deltatune.core.fingerprint import Fingerprint

__all__ = ["model_card"]

_MIB = 1 << 20
_NAME = re.compile(r"[\w./-]+")
_SIGNS = {one: f"\\{one}" for one in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_SHARES = ("ACC", "accuracy")  # metrics whose standard error follows from the number of rows
_RUN = ("seed", "budget", "settings")


def model_card(artefact: Artefact, measured: Mapping[str, Any] | None = None) -> str:
    """Returns the page in Markdown, the same text for the same arguments.

    What is not known is left out. Facts of another form than ours are left out, too.

    Args:
        artefact: the delta.
        measured: "seconds" of training, "memory" in bytes and "device" of the run.
    """
    facts = artefact.facts
    rows = (
        *_what(artefact),
        *_learnt(facts),
        *_trained(facts, measured or {}),
        ("Digest", f"sha256 {_code(artefact.digest)}"),
    )
    table = "\n".join(f"| {name} | {said} |" for name, said in rows)
    known = facts.get("backbone") or artefact.backbone.name
    name = known if isinstance(known, str) and _NAME.fullmatch(known) else "the backbone"
    return (
        f"# {_text(artefact.method)} for {_text(name)}\n\n| | |\n|---|---|\n{table}\n\n"
        "## How to load\n\n```python\nimport deltatune as dt\n\n"
        f"backbone = dt.load_backbone({name!r}{_labels(facts)})\n"
        'delta = dt.load("this folder", backbone.model)\n```\n\n'
        "The backbone is compared with the one named here, and every tensor with its digest.\n"
    )


def _what(artefact: Artefact) -> Iterator[tuple[str, str]]:
    """What it is, and of what."""
    made_for, facts = artefact.backbone, artefact.facts
    yield "Method", _code(artefact.method)
    yield "Backbone", _backbone(made_for)
    if isinstance(facts.get("licence"), str):
        yield "Licence of the backbone", _text(facts["licence"])
    files = facts.get("backbone_files")
    if isinstance(files, dict) and files:
        named = (f"{_text(name)} {_code(str(digest))}" for name, digest in files.items())
        yield "Its files, SHA-256", ", ".join(named)
    stored = artefact.numbers
    share = f", {stored / made_for.parameters:.3%} of the backbone" if made_for.parameters else ""
    yield "Stored", f"{stored:,} numbers{share}; {artefact.size:,} bytes"
    if isinstance(facts.get("trainable"), int):
        yield "Trained", f"{facts['trainable']:,} numbers"


def _backbone(made_for: Fingerprint) -> str:
    revision = f" at {_code(made_for.revision)}" if made_for.revision else ""
    kept = made_for.quantised or made_for.dtype
    return (
        f"{_text(made_for.name) + ', ' if made_for.name else ''}{_text(made_for.kind)}{revision}, "
        f"{made_for.parameters:,} parameters, {_text(kept)}; architecture "
        f"{_code(made_for.architecture)}, weights {_code(made_for.weights or 'not known')}"
    )


def _learnt(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What it was trained on, and how well it does that."""
    if isinstance(facts.get("task"), str):
        version = f" version {facts['task_version']}" if "task_version" in facts else ""
        protocol = f", protocol {facts['protocol']}" if "protocol" in facts else ""
        yield "Task", _text(f"{facts['task']}{version}{protocol}")
    if isinstance(facts.get("rows"), str):
        yield "Rows", ", ".join((*_counts(facts), f"content {_code(facts['rows'])}"))
    for name in ("test", "validation"):
        scores = facts.get(name)
        if isinstance(scores, dict) and scores:
            rows = _count(facts, name)
            yield f"Scores on {name} rows", ", ".join(_score(*one, rows) for one in scores.items())


def _trained(facts: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How it was trained, and what that took."""
    if any(name in facts for name in _RUN):
        settings = facts.get("settings")
        rate = settings.get("learning_rate") if isinstance(settings, dict) else None
        said = f"{facts.get('budget', 'unknown')}, seed {facts.get('seed', 'unknown')}"
        yield "Run", _text(said if rate is None else f"{said}, learning rate {rate}")
    parts = []
    if measured.get("seconds") is not None:
        parts.append(f"{measured['seconds']:,.1f} s of training")
    if measured.get("memory") is not None:
        parts.append(f"at most {measured['memory'] / _MIB:,.0f} MiB")
    if parts:
        yield "Took", _text(", ".join([*parts, f"on {measured.get('device', 'unknown')}"]))
    versions = facts.get("versions")
    if isinstance(versions, dict):
        yield "Made with", _text(", ".join(f"{name} {v}" for name, v in versions.items()))


def _score(name: str, value: Any, rows: int | None) -> str:
    if not isinstance(value, int | float):
        return _text(f"{name} unknown")
    if name not in _SHARES or not rows or not 0 <= value <= 1:
        return _text(f"{name} {value:.4f}")
    error = math.sqrt(value * (1 - value) / rows)
    return _text(f"{name} {value:.4f} (standard error {error:.4f} over {rows:,} rows)")


def _counts(facts: Mapping[str, Any]) -> list[str]:
    counts = facts.get("counts")
    held = counts.items() if isinstance(counts, dict) else ()
    return [_text(f"{count:,} {name}") for name, count in held if isinstance(count, int)]


def _count(facts: Mapping[str, Any], split: str) -> int | None:
    counts = facts.get("counts")
    found = counts.get(split) if isinstance(counts, dict) else None
    return found if isinstance(found, int) else None


def _labels(facts: Mapping[str, Any]) -> str:
    width = facts.get("head_width")
    return f", labels={width}" if isinstance(width, int) and width else ""


def _text(said: str) -> str:
    """A text that is no markup, whoever wrote it."""
    flat = " ".join(said.split())
    return "".join(_SIGNS.get(one, one) for one in flat)


def _code(said: str) -> str:
    """A text in the type of code."""
    flat = " ".join(said.replace("`", "'").split())
    return f"`{flat}`".replace("|", "\\|")
