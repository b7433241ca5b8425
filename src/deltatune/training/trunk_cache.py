"""The trunk cache: what the frozen blocks below all deltas give is computed once for each row.

From the second epoch on, and where several runs share data in the first already, a row's states are
read instead of computed. They are kept by the content of the row, without its padding on the right,
for one trunk: its weights, its boundary, the precision of the run. The first batch, and the first
with padding, are computed both ways and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.core.chain import Inner
from deltatune.core.errors import ArtefactError, ConfigurationError, UnsupportedError
from deltatune.core.fingerprint import digest
from deltatune.core.run import Run
from deltatune.core.trunk import Trunk
from deltatune.training.progress import Progress
from deltatune.training.settings import Settings
from deltatune.training.states import FolderStates, MemoryStates, States

__all__ = ["TrunkCache"]

# What has an entry for each token. A row with other inputs is known by these with their padding.
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# Below this share of a step there is little to gain for the memory.
_LEAST_SHARE = 0.1
# How far results may differ, relative and absolute: well above rounding, well below what a wrong
# state gives. By the coarsest number format on the way.
_CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 5e-2


class TrunkCache:
    """A cache for `fit` and `fit_many`.

    One object may serve several runs, one after the other: over the same backbone, boundary and
    precision they share what is kept in memory. It is used where the trunk is at least a tenth of a
    step and rows are seen again; a folder is filled by a run of one epoch too.

    Args:
        capacity: in bytes, of the states in memory, or of all files in the folder.
        folder: where the states are kept; None: in memory. It serves one run at a time.
        dtype: of what is kept; None: as it is computed, which is exact. `torch.bfloat16` halves the
            bytes of an fp32 run and rounds.

    Attributes:
        served: rows that were read, with repetition.
        computed: rows that were computed.
    """

    def __init__(
        self,
        capacity: int = 2 << 30,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if capacity <= 0:
            raise ConfigurationError(f"capacity is a positive number of bytes; found {capacity}.")
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigurationError(f"States are floating-point numbers; {dtype} holds none.")
        self.capacity, self.dtype = capacity, dtype
        self.folder = None if folder is None else Path(folder)
        self.served = self.computed = 0
        self._memory: tuple[dict[str, str], MemoryStates] | None = None

    @contextmanager
    def serving(
        self, run: object, settings: Settings, visits: float, progress: Progress
    ) -> Iterator[None]:
        """Within it the run's model reads what is kept, where that pays.

        Args:
            run: a `Run` or `SlotRun`; all runs on its model are served.
            settings: of the run.
            visits: how often a row is seen, in the mean.
            progress: hears what was decided.

        Raises:
            UnsupportedError: what lies below the deltas is no fixed function of a row.
            ConfigurationError: the run has no delta, or the folder cannot be used.
        """
        if not isinstance(run, Run):
            raise ConfigurationError(
                f"A trunk cache needs a Run, which knows its delta; found {type(run).__name__}."
            )
        if settings.base_dropout:
            raise UnsupportedError(
                "With base_dropout=True the backbone gives something else in every pass. Set "
                "base_dropout=False or train without a trunk cache."
            )
        if settings.packing:
            raise UnsupportedError(
                "A trunk cache reads the states of rows that are padded; packing lays them behind "
                "each other. Switch one of the two off."
            )
        trunk = Trunk(run.model)
        reason = self._against(trunk, visits)
        if reason is not None:
            progress.say(f"trunk cache not used: {reason}")
            yield
            return
        times = "an unknown number of" if math.isinf(visits) else f"{visits:.3g}"
        progress.say(
            f"trunk cache used: {len(trunk.below)} blocks below {trunk.boundary}, about "
            f"{trunk.share:.0%} of a step, and {times} epochs"
        )
        states = self._open(trunk, settings)
        try:
            with trunk.installed(_Served(self, run, trunk, states, progress)):
                yield
        finally:
            states.close()

    def _against(self, trunk: Trunk, visits: float) -> str | None:
        """Why the cache would not pay; None if it does."""
        if not trunk.below:
            return f"no block lies below {trunk.boundary}, the lowest place that is trained"
        if trunk.share < _LEAST_SHARE:
            return f"what lies below {trunk.boundary} is {trunk.share:.0%} of a step"
        if visits <= 1 and self.folder is None and self._memory is None:
            return "every row is seen once"
        return None

    def _open(self, trunk: Trunk, settings: Settings) -> States:
        identity = {
            **trunk.identity(),
            "precision": settings.precision,
            "dtype": "as computed" if self.dtype is None else str(self.dtype),
        }
        if self.folder is not None:
            return FolderStates(self.folder, identity, self.capacity)
        if self._memory is None or self._memory[0] != identity:
            self._memory = identity, MemoryStates(self.capacity)
        return self._memory[1]


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch: their keys, and how many tokens each has without what pads it."""

    keys: Sequence[bytes]
    lengths: Sequence[int]
    tokens: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> _Rows:
        """Raises UnsupportedError for a batch whose rows cannot be told apart."""
        # Labels, and what a decoder reads of its own, come in above the trunk.
        names = [n for n in batch if n != "labels" and not n.startswith("decoder_")]
        held = {name: batch[name].cpu() for name in names if isinstance(batch[name], Tensor)}
        counts = {value.shape[0] if value.dim() else 0 for value in held.values()}
        strange = [n for n in names if n not in held and batch[n] is not None]
        flat = "input_ids" in held and held["input_ids"].dim() == 2
        if strange or len(counts) != 1 or not flat:
            raise UnsupportedError(
                "A trunk cache tells rows apart by input_ids [rows, tokens] and other tensors with "
                f"one entry for each row; found {', '.join(strange or names)}. Train without it."
            )
        size, tokens = held["input_ids"].shape
        lengths = [tokens] * size
        padded = held.keys() <= set(_BY_TOKEN) and "attention_mask" in held
        if padded and all(value.shape == (size, tokens) for value in held.values()):
            last = (held["attention_mask"] != 0).mul(torch.arange(1, tokens + 1)).amax(1)
            lengths = last.clamp(min=1).tolist()
        keys = [
            digest({name: v[k, :n] if n < tokens else v[k] for name, v in held.items()})
            for k, n in enumerate(lengths)
        ]
        return cls([bytes.fromhex(key) for key in keys], lengths, tokens)


class _Served:
    """In the place of a model while it trains: reads the states of rows, or computes and keeps."""

    def __init__(
        self, cache: TrunkCache, run: Run, trunk: Trunk, states: States, progress: Progress
    ) -> None:
        self.cache, self.run, self.trunk = cache, run, trunk
        self.states, self.progress = states, progress
        self.like: Tensor | None = None  # an empty batch of states: their form, type and device
        self.compared: set[bool] = set()  # with and without padding
        self.warned = False

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (self.run.delta.training and torch.is_grad_enabled()):  # an evaluation
            return inner(*args, **kwargs)
        if args:
            raise UnsupportedError("A trunk cache needs a batch given by names, as `run(**batch)`.")
        rows = _Rows.of(kwargs)
        padded = min(rows.lengths) < rows.tokens
        read = self._states if padded in self.compared else self._compared
        self.compared.add(padded)
        return self.trunk.above(inner, kwargs, read(inner, kwargs, rows))

    def _states(self, inner: Inner, batch: Mapping[str, Any], rows: _Rows) -> Tensor:
        """What the boundary reads, [rows, ...], padded with zeros."""
        assert self.like is not None
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, int] = {}
        for k, key in enumerate(rows.keys):
            kept = None if key in found or key in missing else self._read(key, rows.lengths[k])
            if kept is not None:
                found[key] = kept
            elif key not in found:
                missing.setdefault(key, k)
        self.cache.computed += len(missing)
        self.cache.served += len(rows.keys) - len(missing)
        if missing:
            computed = self._reach(inner, batch, rows, list(missing.values()))
            for key, states in zip(missing, computed, strict=True):
                # What is kept is used at once, so that rounding is the same in every epoch.
                found[key] = states.to(self._kept())
                self._write(key, found[key])
        padded = torch.zeros((len(rows.keys), *self._shape(rows.tokens)), dtype=self.like.dtype)
        for k, key in enumerate(rows.keys):
            padded[k][: found[key].shape[0]] = found[key]
        return padded.to(self.like.device)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of the states of one row."""
        assert self.like is not None
        own = tuple(self.like.shape[1:])
        return (tokens, *own[1:]) if len(own) > 1 else own

    def _reach(
        self, inner: Inner, batch: Mapping[str, Any], rows: _Rows, chosen: Sequence[int]
    ) -> list[Tensor]:
        """Computes the states of some rows, padded to the longest of them."""
        longest = max(rows.lengths[k] for k in chosen)
        part = {name: value[list(chosen)] for name, value in batch.items() if value is not None}
        if longest < rows.tokens:
            part |= {name: part[name][:, :longest] for name in _BY_TOKEN if name in part}
        with ExitStack() as routed:  # below the boundary no delta acts, whatever it is routed to
            for delta in self.run.delta.host.deltas:
                if delta.routed is not None:
                    routed.enter_context(delta.route([None] * len(chosen)))
            states = self.trunk.reach(inner, part).cpu()
        return [
            one[: rows.lengths[k]] if one.dim() > 1 else one
            for k, one in zip(chosen, states, strict=True)
        ]

    def _read(self, key: bytes, length: int) -> Tensor | None:
        content = self.states.read(key)
        if content is None or self.like is None:
            return None
        return content.view(self._kept()).view(self._shape(length))

    def _write(self, key: bytes, states: Tensor) -> None:
        self.states.write(key, states.contiguous().view(torch.uint8).flatten())
        if self.states.full is not None and not self.warned:
            self.warned = True
            self.progress.say(
                f"trunk cache is full: {self.states.full}. {len(self.states):,} rows are kept, the "
                "others are computed every time."
            )

    def _kept(self) -> torch.dtype:
        assert self.like is not None
        return self.cache.dtype or self.like.dtype

    def _compared(self, inner: Inner, batch: Mapping[str, Any], rows: _Rows) -> Tensor:
        """The states of a batch that is computed with and without the cache.

        Raises:
            UnsupportedError: the model's output is not a function of what the boundary reads.
            ArtefactError: what is kept is not what the trunk gives.
        """
        fresh = self.trunk.reach(inner, batch)
        self.like = fresh[:0]
        if fresh.shape != (len(rows.keys), *self._shape(rows.tokens)):
            raise UnsupportedError(
                f"{self.trunk.boundary} reads {list(fresh.shape)}, in which the rows of the batch "
                "cannot be told apart. Train without a trunk cache."
            )
        mask = batch.get("attention_mask")
        given = self._states(inner, batch, rows)
        limit = max(_limit(fresh.dtype), _limit(self._kept()), _limit(_autocast(fresh)))
        if not _close(_shown(given, mask), _shown(fresh, mask), limit):
            raise ArtefactError(
                f"What the trunk cache holds is not what the blocks below {self.trunk.boundary} "
                "give: the model was changed in a way that its weights do not show. Delete "
                f"{self.cache.folder or 'the cache'} and begin afresh."
            )
        with torch.no_grad():
            plain = _results(inner(**batch), mask)
            served = _results(self.trunk.above(inner, batch, given), mask)
        if not all(_close(a, b, limit) for a, b in zip(served, plain, strict=True)):
            raise UnsupportedError(
                f"The model's output is not a function of what {self.trunk.boundary} reads of the "
                "rows: more than hidden states goes past it, or padding counts. Train without a "
                "trunk cache."
            )
        return given


def _shown(values: Tensor, mask: Tensor | None) -> Tensor:
    """The entries that are not about padding."""
    if mask is None or values.dim() < 3 or values.shape[:2] != mask.shape:
        return values
    return values[mask != 0]


def _results(output: Any, mask: Tensor | None) -> list[Tensor]:
    """What is compared of an output. Raises UnsupportedError if it has nothing that is known."""
    named = [getattr(output, name, None) for name in ("loss", "logits", "last_hidden_state")]
    found = [_shown(one, mask) for one in named if isinstance(one, Tensor)]
    if not found:
        raise UnsupportedError(
            f"A {type(output).__name__} has no loss, logits or last_hidden_state, by which a trunk "
            "cache makes sure that it is right. Train without it."
        )
    return found


def _autocast(like: Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _limit(dtype: torch.dtype) -> float:
    return _CLOSE.get(dtype, _COARSE)


def _close(a: Tensor, b: Tensor, limit: float) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=limit, atol=limit, equal_nan=True)
