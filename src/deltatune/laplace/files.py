"""The file of a posterior: its curvature as tensors, all else in the header of the file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltatune.core.bank import Bank
from deltatune.core.delta import Delta
from deltatune.core.errors import ArtefactError
from deltatune.core.untrusted import json_of, tensors_of
from deltatune.laplace.curvature import Block, matrix_shape
from deltatune.laplace.posterior import Posterior
from deltatune.laplace.rows import Read, logits_of

__all__ = ["Header", "load", "save"]

_KEY = "deltatune"


class Header(BaseModel):
    """What the header says.

    Attributes:
        format, version: what the file is.
        leaves: a digest of the leaves that are the mean.
        precision, noise, rows: as of `Posterior`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["deltatune.laplace"] = "deltatune.laplace"
    version: Literal[1] = 1
    leaves: str
    precision: float
    noise: float | None
    rows: int


def save(posterior: Posterior, path: Path) -> Path:
    """See `Posterior.save`."""
    header = Header(
        leaves=posterior.delta.bank.digest(posterior.slot),
        precision=posterior.precision,
        noise=posterior.noise,
        rows=posterior.rows,
    )
    tensors = {
        f"{name}#{part}": value.contiguous()
        for name, block in posterior.blocks.items()
        for part, value in vars(block).items()
        if value is not None
    }
    try:
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(descriptor)
        try:
            save_file(tensors, part, {_KEY: header.model_dump_json()})
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write the posterior to {path}: {error}.") from error
    return path


def load(
    path: str | Path,
    delta: Delta,
    *,
    slot: int = 0,
    together: int = 8,
    read: Read = logits_of,
) -> Posterior:
    """The posterior that `Posterior.save` wrote, of the delta that it was fitted to.

    Args:
        path: of the file.
        delta: attached; its leaves are those that were the mean.
        slot: which of its slots.
        together, read: see `fit`.

    Raises ArtefactError for a file that is damaged, or made for other leaves.
    """
    delta.check_slot(slot)
    try:
        with tensors_of(Path(path)) as file:
            held = (file.metadata() or {}).get(_KEY, "")
            header = Header.model_validate(json_of(held.encode()))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:  # those of pydantic, too
        first = str(error).splitlines()[0]
        raise ArtefactError(f"{path} is no posterior: {first}. Fit it again.") from None
    if header.leaves != delta.bank.digest(slot):
        raise ArtefactError(
            f"{path} was made for other leaves than slot {slot} of {delta.name} holds. Load the "
            "delta that it was fitted to."
        )
    assert isinstance(delta.bank, Bank)  # no posterior has the digest of one that trains in place
    blocks = {}
    for name, leaf in delta.bank.trained.items():
        parts = {part: tensors.pop(f"{name}#{part}", None) for part in Block.__dataclass_fields__}
        blocks[name] = _block(path, name, matrix_shape(leaf), parts)
    if tensors:
        raise ArtefactError(f"{path} holds {next(iter(tensors))}, which no leaf has.")
    fields = header.precision, header.noise, header.rows
    return Posterior(delta, slot, blocks, *fields, together, read)


def _block(
    path: str | Path, name: str, shape: tuple[int, int], parts: dict[str, Tensor | None]
) -> Block:
    held = [part for part in parts.values() if part is not None]
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in held):
        raise ArtefactError(f"{path}: {name} holds what is no finite number. Fit it again.")
    values, left, right = parts["values"], parts["left"], parts["right"]
    widths = [side.shape for side in (left, right) if side is not None and side.dim() == 2]
    entries = shape[0] * shape[1]
    if len(widths) == 2 and (widths[0][0], widths[1][0]) == shape:
        entries = widths[0][1] * widths[1][1]
    elif left is not None or right is not None:
        entries = -1
    if values is None or tuple(values.shape) != (entries,) or not bool((values >= 0).all()):
        raise ArtefactError(f"{path}: {name} does not have the form of a curvature. Fit it again.")
    return Block(values, left, right)
