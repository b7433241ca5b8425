"""The artefact: a folder with `delta.json` and `delta.safetensors`, written at once and read
strictly, and `card.md`, which says the same to people.

It holds the stored leaves only, and the head if one was trained. It names its backbone; loading on
another one is refused in one sentence. A composition is one artefact. Nothing is pickled, and every
size is checked against what the method announces before a tensor is allocated.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors import numpy as numpy_files
from safetensors.torch import save_file
from torch import Tensor, nn

from deltatune.core.attaching import attach_values
from deltatune.core.delta import Delta
from deltatune.core.description import Artefact, TensorEntry, describe, sealed
from deltatune.core.errors import (
    ArtefactError,
    BackboneMismatchError,
    ConfigurationError,
    DeltatuneError,
    StateError,
)
from deltatune.core.fingerprint import Fingerprint, vocabulary
from deltatune.core.grammar import Expression, parse
from deltatune.core.host import Host, host_of
from deltatune.core.in_place import InPlaceBank
from deltatune.core.layout import layout, leaves_of
from deltatune.core.leaf import Leaf, zeros
from deltatune.core.model_card import model_card
from deltatune.core.site import originals
from deltatune.core.sparse import pack, packed_shapes, places_of, unpack
from deltatune.core.untrusted import content_of, size_of, tensors_of

__all__ = [
    "CARD",
    "FILES",
    "OnMismatch",
    "backbone_of",
    "files_of",
    "load",
    "read",
    "read_listed",
    "read_tensors",
    "refuse",
    "save",
    "stored_tensors",
]

OnMismatch: TypeAlias = Literal["refuse", "warn"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FILES = _JSON, _TENSORS = "delta.json", "delta.safetensors"
CARD = "card.md"
# By name: what a file says is looked up among them, and never among all that torch has.
_DTYPES = {_name(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}


def backbone_of(delta: Delta) -> Fingerprint:
    """The fingerprint of the backbone of a delta, as it was before any delta."""
    own: Mapping[str, Tensor] = originals(delta.model) if delta.host.merged else {}
    if isinstance(delta.bank, InPlaceBank):
        names = [name.partition("/")[2] for name in delta.bank.names]
        own = dict(zip(names, delta.bank.before, strict=True))
        tied = {id(p): name for name, p in delta.model.named_parameters()}
        for name, value in delta.model.state_dict(keep_vars=True).items():
            if id(value) in tied:
                own[name] = own[tied[id(value)]]
    heads = [
        site.path for part in delta.parts if part.method.category == "head" for site in part.sites
    ]
    return delta.host.fingerprint(heads, own)


@torch.no_grad()
def stored_tensors(delta: Delta, slot: int = 0, *, as_trained: bool = False) -> dict[str, Tensor]:
    """What an artefact holds of one slot: the leaves of `method.stored()`, by full name; with
    `as_trained` those of the method itself.
    """
    held = delta.bank.read(slot)
    if isinstance(delta.bank, InPlaceBank):
        if not delta.attached:
            raise StateError(
                f"{delta.name} is detached, and the backbone is as it was. Save before detach()."
            )
        return {name: value.detach() for name, value in held.items()}
    if as_trained:
        return {name: value.detach() for name, value in held.items()}
    stored: dict[str, Tensor] = {}
    kept = Expression(tuple(method.stored() for method in delta.expression))
    parts = delta.parts if kept == delta.expression else layout(delta.model, kept)
    for part, plain in zip(delta.parts, parts, strict=True):
        for site, names, wanted in zip(part.sites, part.names, plain.names, strict=True):
            own = part.method.collapse(site, {leaf: held[full] for leaf, full in names.items()})
            stored |= {full: own[leaf].detach() for leaf, full in wanted.items()}
    return stored


def save(
    delta: Delta, folder: str | Path, *, slot: int = 0, facts: Mapping[str, Any] | None = None,
    overwrite: bool = False, as_trained: bool = False, measured: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes one slot of a delta as an artefact; nothing is visible under `folder` before all of it
    is. What the slot shares with others is in it too. A method that trains in another form than it
    is stored in (`p_tuning`) is written in the first with `as_trained`, to be trained further.
    What was `measured` and differs from run to run is for the card alone; see `model_card`.

    Raises:
        ArtefactError: the folder exists already and `overwrite` is False, it holds anything but an
            artefact, it cannot be written, or a tensor holds values that are not finite.
        ConfigurationError: the facts are not what JSON can hold.
        StateError: the delta trained the backbone in place and is detached.
    """
    target = Path(folder)
    _check_place(target, overwrite)
    told = {"origin": delta.origins[slot]} if slot in delta.origins else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ArtefactError(f"Cannot write to {target.parent}: {error.strerror}.") from error
    try:
        content = _write(delta, slot, {**told, **(facts or {})}, part, as_trained)
        (part / CARD).write_text(model_card(content, measured), encoding="utf-8")
        _publish(part, target)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write the delta to {target}: {error}.") from error
    except ValueError as error:
        raise ConfigurationError(f"The facts cannot be written as JSON: {error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    delta.saved[slot] = (str(target), delta.bank.digest(slot))
    return target


def _check_place(target: Path, overwrite: bool) -> None:
    """Raises ArtefactError unless the place is free, or holds a delta that may be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise ArtefactError(f"{target} exists. Choose another folder, or pass overwrite=True.")
    if not target.is_dir() or {path.name for path in target.iterdir()} - {*FILES, CARD}:
        raise ArtefactError(
            f"{target} holds something else than a delta, and overwriting would remove it. "
            "Choose another folder."
        )


def _write(
    delta: Delta, slot: int, facts: dict[str, Any], part: Path, as_trained: bool
) -> Artefact:
    """Writes description and tensors of an artefact; returns the first."""
    held = stored_tensors(delta, slot, as_trained=as_trained)
    tensors = {name: value.cpu().contiguous() for name, value in held.items()}
    expression = delta.expressions[slot]
    if not as_trained:
        expression = Expression(tuple(method.stored() for method in expression))
    _check_finite(tensors, f"{delta.name} cannot be saved")
    packed, entries = pack(tensors)
    _write_tensors(packed, part / _TENSORS)
    content = Artefact(
        method=str(expression),
        backbone=backbone_of(delta),
        tensors={
            name: TensorEntry(
                shape=tuple(value.shape), dtype=_name(value.dtype), entries=entries.get(name)
            )
            for name, value in tensors.items()
        },
        size=(part / _TENSORS).stat().st_size,
        blake3=_blake3(part / _TENSORS),
        facts=facts,
    )
    content, text = sealed(content)
    (part / _JSON).write_text(text, encoding="utf-8")
    return content


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors; the road through numpy takes a quarter of the time, but knows no bf16."""
    if any(value.dtype is torch.bfloat16 for value in tensors.values()):
        save_file(tensors, path)
    else:
        numpy_files.save_file({name: value.numpy() for name, value in tensors.items()}, path)


def read(folder: str | Path) -> Artefact:
    """The content of an artefact's `delta.json`, with the tensor file's size and digest verified.

    Raises ArtefactError if a file is missing, truncated, malformed or of another version.
    """
    path = Path(folder)
    try:
        content, size = content_of(path / _JSON), size_of(path / _TENSORS)
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{path} is no delta: {Path(error.filename).name} is missing."
        ) from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}. Fetch it again.") from None
    artefact = describe(content, path / _JSON)
    if size != artefact.size:
        raise ArtefactError(
            f"{path / _TENSORS} has {size:,} bytes, not {artefact.size:,}: it is truncated or was "
            "replaced. Fetch it again."
        )
    if _blake3(path / _TENSORS) != artefact.blake3:
        raise ArtefactError(
            f"{path / _TENSORS} does not have the digest that delta.json names. Fetch it again."
        )
    return artefact


def load(
    model: nn.Module, folder: str | Path, *, seed: int = 0, across_formats: bool = False,
    other_weights: OnMismatch = "refuse", tokenizer: Any = None,
) -> Delta:  # fmt: skip
    """Attaches the delta in `folder` to a model.

    Args:
        model: the backbone that it was made for.
        folder: where it was saved.
        seed: of dropout.
        across_formats: take a backbone of the same architecture that is kept in another format
            too: a delta trained on int8 or NF4 onto the backbone in plain numbers, or the other way
            round. Whether the weights are the same is not verified then.
        other_weights: what to do where the architecture is the same and the weights are not, as
            those of a backbone that was trained further: "warn" loads it and says so.
        tokenizer: its tokens must have the numbers that they had in training, where the facts of
            the delta name its vocabulary.

    Raises:
        BackboneMismatchError: it was made for another backbone, or another tokenizer.
        ArtefactError: its files are damaged, or do not hold what its method needs.
    """
    artefact = read(folder)
    known = artefact.facts.get("vocabulary")
    if tokenizer is not None and isinstance(known, str) and known != vocabulary(tokenizer):
        raise BackboneMismatchError(
            f"The delta in {folder} was trained with another tokenizer: tokens of this one have "
            "other numbers, so that the backbone would read other words. Load the tokenizer of its "
            "backbone."
        )
    host, excluded = host_of(model) or Host(model), artefact.backbone.excluded
    try:
        found = host.fingerprint(excluded, originals(model), like=artefact.backbone)
        refuse(folder, artefact, found, across_formats=across_formats, other_weights=other_weights)
        delta = _attached(model, Path(folder), artefact, seed)
    finally:
        host.sweep()
    delta.saved[0] = (str(folder), delta.bank.digest(0))
    origin = artefact.facts.get("origin")
    if isinstance(origin, dict):
        delta.origins[0] = origin
    return delta


def _attached(model: nn.Module, folder: Path, artefact: Artefact, seed: int) -> Delta:
    """Attaches what an artefact holds to the backbone that it is made for."""
    try:
        expression = parse(artefact.method)
        parts = layout(model, expression)
    except DeltatuneError as error:
        raise ArtefactError(f"{folder}: {artefact.method!r} cannot be attached: {error}") from None
    tensors = read_tensors(folder, artefact, leaves_of(parts))
    return attach_values(model, expression, parts, tensors, seed=seed)


def refuse(
    folder: str | Path, artefact: Artefact, found: Fingerprint, *, across_formats: bool = False,
    other_weights: OnMismatch = "refuse",
) -> None:  # fmt: skip
    """Raises BackboneMismatchError if the backbone found is not the one an artefact is made for;
    warns instead where only the weights are others and that is wanted.
    """
    made_for = artefact.backbone
    difference = made_for.difference(found, across_formats=across_formats)
    if difference is None:
        return
    said = f"The delta in {folder} was made for {made_for.name or made_for.kind}; this model is "
    said += f"{difference}."
    same = (made_for.architecture, made_for.quantised) == (found.architecture, found.quantised)
    if same and other_weights == "warn":
        warnings.warn(f"{said} It is loaded all the same: see what it does.", stacklevel=4)
        return
    raise BackboneMismatchError(f"{said} Load that backbone, or train the delta anew on this one.")


def files_of(folder: Path) -> tuple[Path, Path]:
    """The description and the tensors of an artefact."""
    return folder / _JSON, folder / _TENSORS


def read_listed(folder: Path, artefact: Artefact) -> dict[str, Tensor]:
    """The tensors, held to their description alone. Raises ArtefactError."""
    leaves = {
        name: replace(zeros(*entry.shape), dtype=_DTYPES.get(entry.dtype, torch.float32))
        for name, entry in artefact.tensors.items()
    }
    return read_tensors(folder, artefact, leaves)


def read_tensors(folder: Path, artefact: Artefact, leaves: Mapping[str, Leaf]) -> dict[str, Tensor]:
    """The tensors, read only after their names and shapes are those that the method announces."""
    expected = {name: leaf.shape for name, leaf in leaves.items()}
    listed = {name: entry.shape for name, entry in artefact.tensors.items()}
    if listed != expected:
        wrong = sorted(n for n in {*expected, *listed} if expected.get(n) != listed.get(n))
        name = wrong[0]
        raise ArtefactError(
            f"{folder}: {artefact.method} needs {name} of shape {expected.get(name, 'none')}, "
            f"the file lists {listed.get(name, 'none')} ({len(wrong)} such)."
        )
    counts = {name: entry.entries for name, entry in artefact.tensors.items()}
    entries = {name: count for name, count in counts.items() if count is not None}
    try:
        with tensors_of(folder / _TENSORS) as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if shapes != packed_shapes(expected, entries, artefact.size):
                raise ArtefactError(
                    f"{folder / _TENSORS} does not hold the tensors that delta.json lists."
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtefactError(f"{folder / _TENSORS} cannot be read: {error}.") from None
    for name in entries:
        places = tensors.pop(places_of(name))
        tensors[name] = unpack(name, expected[name], tensors[name], places)
    for name, value in tensors.items():
        real = leaves[name].dtype.is_floating_point
        if _name(value.dtype) != artefact.tensors[name].dtype or value.is_floating_point() != real:
            raise ArtefactError(
                f"{folder / _TENSORS}: {name} is {value.dtype}, which it cannot be."
            )
    _check_finite(tensors, f"{folder} cannot be loaded")
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, value in tensors.items():
        # A sum is one pass; it may overflow, so that only what it suspects is looked at.
        if value.is_floating_point() and not (math.isfinite(value.sum()) or value.isfinite().all()):
            raise ArtefactError(
                f"{what}: {name} holds values that are not finite. Train it anew, at a lower rate."
            )


def _publish(part: Path, target: Path) -> None:
    """Renames the finished folder to its place; a former one goes only after that succeeded."""
    for file in part.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    part.chmod(0o755)
    if not target.exists():
        part.rename(target)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)) / "former"
    target.rename(former)
    try:
        part.rename(target)
    except OSError:
        former.rename(target)  # if this fails too, the former one stays where it was put
        former.parent.rmdir()
        raise
    shutil.rmtree(former.parent, ignore_errors=True)


def _blake3(path: Path) -> str:
    """As safe as SHA-256, and five to thirty times as fast where processors cannot compute that."""
    try:
        return blake3().update_mmap(path).hexdigest()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}.") from None
