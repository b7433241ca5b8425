"""Packing: the rows of a padded batch lie behind each other while a token stack computes them.

A model is called with a padded batch, as ever. Around its token stack (the encoder of an
encoder-decoder, else all blocks) the rows are laid behind each other into fewer and wider ones,
positions start anew with every row, no row attends to another, and behind the stack each row gets
back its own place. Heads, poolers, losses and whoever counts see the padded batch alone, so that
each row's result is what it is unpacked.

Rows are kept apart by the two ways that transformers has for it. A causal stack takes positions
that start anew, with no mask; any other takes a mask [rows, 1, tokens, tokens]. Which of them a
model takes is found by trying, and held against what it gives for the same rows unpacked, before
any training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, packed_sequence_mask_function

from deltatune.core.calls import bound, parameter_names
from deltatune.core.chain import Around, Inner
from deltatune.core.delta import Delta
from deltatune.core.errors import DeltatuneError, UnsupportedError
from deltatune.core.host import Host
from deltatune.core.positions import first_position, position_table
from deltatune.core.rows import fit as fit_rows
from deltatune.core.run import Run
from deltatune.training.batch import row_ids, row_length
from deltatune.training.parts import pack

__all__ = ["Packing"]

# In tokens. Of 64 to 512, 96 to 256 were the fastest within noise (BERT-base layers, fp32, one
# core): narrower rows are filled worse, wider ones spend more on attention.
_WIDTH = 128


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of a padded batch [rows, tokens] lie in packed rows.

    Attributes:
        source: [packed rows, width], which token of the flattened batch lies there; behind the last
            row some token or other.
        target: [rows, tokens], where each token lies in the flattened packed rows; padding
            anywhere.
        positions: [packed rows, width], of the token in its own row.
        segments: [packed rows, width], the row it belongs to, -1 for none.
        owners: for each packed row one of its rows.
    """

    source: Tensor
    target: Tensor
    positions: Tensor
    segments: Tensor
    owners: list[int]

    @classmethod
    def of(cls, real: Tensor, lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> _Layout:
        """The layout of rows in these bins; `real` [rows, tokens] says what is no padding."""
        width = max(sum(lengths[row] for row in held) for held in bins)
        starts = [0] * len(lengths)
        for place, held in enumerate(bins):
            start = place * width
            for member in held:
                starts[member] = start
                start += lengths[member]
        rank = real.long().cumsum(1) - 1
        target = torch.tensor(starts, device=real.device)[:, None] + rank
        there = target[real]
        each = torch.arange(real.numel(), device=real.device).view(real.shape)
        row = torch.arange(len(real), device=real.device)[:, None].expand_as(rank)

        def laid(values: Tensor, rest: Tensor | int) -> Tensor:
            flat = torch.zeros(len(bins) * width, dtype=torch.long, device=real.device) + rest
            return flat.index_copy(0, there, values[real]).view(len(bins), width)

        return cls(
            source=laid(each, each[real][0]),
            target=target.masked_fill(~real, 0),
            positions=laid(rank, 0),
            segments=laid(row, -1),
            owners=[held[0] for held in bins],
        )

    def packed(self, value: Tensor) -> Tensor:
        """[rows, tokens, ...] to [packed rows, width, ...]."""
        return value.flatten(0, 1)[self.source]

    def padded(self, value: Tensor) -> Tensor:
        """[packed rows, width, ...] to [rows, tokens, ...]."""
        return value.flatten(0, 1)[self.target]


@dataclass(frozen=True, eq=False)
class Packing:
    """How the token stack of a model is packed. Made by `Packing.of`.

    Attributes:
        host: of the model's deltas.
        stack: takes token ids [rows, tokens] and gives hidden states [rows, tokens, width].
        causal: which of the two ways keeps rows apart.
        first: the position of a row's first token.
        width: how many tokens a packed row may have; it is raised to the longest row.
    """

    host: Host
    stack: PreTrainedModel
    causal: bool
    first: int
    width: int = _WIDTH

    @classmethod
    def of(
        cls,
        run: Any,
        rows: Sequence[Any],
        collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
        device: torch.device,
    ) -> Packing:
        """How a run's model is packed: as it gives the same hidden states for some rows either way.

        Args:
            run: a `Run`, on its device. It is left in evaluation mode.
            rows: the training data, of which the longest row is tried beside another.
            collate: rows to a batch with an `attention_mask` [rows, tokens].
            device: of the run.

        Raises UnsupportedError if the model, a delta on it or the batch cannot be packed.
        """
        if not isinstance(run, Run):
            raise UnsupportedError(
                f"Packing is for a Run; found {type(run).__name__}. Switch packing off."
            )
        host = run.eval().delta.host
        stack = _stack(host)
        batch = {name: held.to(device) for name, held in collate(_two_of(rows)).items()}
        mask = batch.get("attention_mask")
        if mask is None:
            raise UnsupportedError(
                f"Packing needs batches with an attention_mask; found {', '.join(batch)}. Let "
                "collate give one, or switch packing off."
            )
        first = first_position(position_table(stack))
        listener, cause = _Listener(), None
        with torch.no_grad(), _around(host, stack, listener):
            run(**batch)
            expected = listener.heard
            for causal in (True, False):
                packing = cls(host, stack, causal, first, width=mask.numel())
                try:
                    with packing.on():
                        run(**batch)
                except DeltatuneError:
                    raise
                except (RuntimeError, ValueError, TypeError, LookupError) as error:
                    cause = error
                    continue
                if _alike(listener.heard, expected, mask.bool()):
                    return replace(packing, width=_WIDTH)
        raise UnsupportedError(
            f"{type(stack).__name__} cannot be packed: its rows are not what they are alone. "
            "Switch packing off."
        ) from cause

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it the model's forward packs."""
        with _around(self.host, self.stack, self):
            yield

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stack's call; one that packing gains nothing for is left as it is."""
        kwargs = bound(parameter_names(self.stack), args, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2 or kwargs.get("past_key_values") is not None:
            return inner(**kwargs)
        real, size = mask.bool(), len(mask)
        lengths = real.sum(1).tolist()
        routes = {
            delta: fit_rows(delta.rows, size).slots
            for delta in self.host.deltas
            if delta.routed is not None
        }
        groups = list(zip(*routes.values(), strict=True)) or [()] * size
        bins = pack(lengths, self.width, groups)
        if len(bins) == size:
            return inner(**kwargs)
        layout = _Layout.of(real, lengths, bins)
        apart: Any = contextlib.nullcontext()
        if isinstance(pooler := getattr(self.stack, "pooler", None), nn.Module):
            apart = _around(self.host, pooler, _Apart(layout, routes))
        with _routed(routes, layout.owners), apart:
            output = inner(**self._packed(kwargs, layout))
        if isinstance(output, tuple):
            return (layout.padded(output[0]), *output[1:])
        output["last_hidden_state"] = layout.padded(output["last_hidden_state"])
        return output

    def _packed(self, kwargs: dict[str, Any], layout: _Layout) -> dict[str, Any]:
        """The arguments of the stack for packed rows."""
        shape, names = kwargs["attention_mask"].shape, parameter_names(self.stack)
        packed = {
            name: layout.packed(value)
            if isinstance(value, Tensor) and value.shape[:2] == shape
            else value
            for name, value in kwargs.items()
        }
        if "position_ids" in names and packed.get("position_ids") is None:
            packed["position_ids"] = layout.positions + self.first
        if "use_cache" in names:  # with a cache, positions that start anew mean nothing
            packed["use_cache"] = False
        packed["attention_mask"] = None if self.causal else self._mask(layout.segments)
        return packed

    def _mask(self, segments: Tensor) -> Tensor:
        """The mask, in the form of the model's kernel, that shows each token its own row."""
        config: Any = self.stack.config
        form = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        count, width = segments.shape
        mask: Tensor = form(
            batch_size=count,
            q_length=width,
            kv_length=width,
            mask_function=packed_sequence_mask_function(segments),
            allow_is_causal_skip=False,
            dtype=self.stack.dtype,
            config=config,
            device=segments.device,
        )
        return mask


@dataclass(eq=False)
class _Apart:
    """Around a pooler: it sees the rows apart, so that the first position of each is its own."""

    layout: _Layout
    routes: Mapping[Delta, Sequence[int | None]]

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _routed(self.routes, range(len(self.layout.target))):
            return inner(self.layout.padded(args[0]), *args[1:], **kwargs)


@dataclass(eq=False)
class _Listener:
    """Around a stack: keeps the hidden states that it gives."""

    heard: Tensor | None = None

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        self.heard = output[0]
        return output


@contextmanager
def _around(host: Host, module: nn.Module, around: Around) -> Iterator[None]:
    """Within it `around` is around the module's calls, inside of what was there before."""
    chain = host.chain(module)
    chain.arounds.append(around)
    try:
        yield
    finally:
        chain.arounds.remove(around)
        host.sweep()


@contextmanager
def _routed(routes: Mapping[Delta, Sequence[int | None]], rows: Sequence[int]) -> Iterator[None]:
    """Within it a batch is routed as these rows of another."""
    with contextlib.ExitStack() as entered:
        for delta, slots in routes.items():
            entered.enter_context(delta.route([slots[row] for row in rows]))
        yield


def _stack(host: Host) -> PreTrainedModel:
    """The token stack of a model. Raises UnsupportedError if it cannot be packed."""
    model = host.model
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"Packing is for models of transformers; {type(model).__name__} is none. Switch "
            "packing off."
        )
    both = model.config.is_encoder_decoder
    stack = cast(PreTrainedModel, model.get_encoder() if both else model.base_model)
    if "position_ids" not in parameter_names(stack) and position_table(stack) is not None:
        raise UnsupportedError(
            f"{type(stack).__name__} counts its positions itself, so they cannot start anew with "
            "every packed row. Switch packing off."
        )
    for delta in host.deltas:
        for method in delta.expression:
            if method.reads():
                raise UnsupportedError(
                    f"{method.name} reads the text of every row, and packed rows hold several. "
                    "Switch packing off."
                )
            if method.face == "embed":
                raise UnsupportedError(
                    f"{method.name} puts tokens in front of every row, and in a packed row there "
                    "is one front for many. Switch packing off, or use prefix."
                )
    return stack


def _two_of(rows: Sequence[Any]) -> list[Any]:
    """The longest row, and the longest that is not its copy: copies would hide that rows mix."""
    ordered = sorted(rows, key=row_length, reverse=True)
    ids = list(row_ids(ordered[0]))
    other = next((row for row in ordered if list(row_ids(row)) != ids), ordered[0])
    return [ordered[0], other]


def _alike(found: Tensor | None, expected: Tensor | None, real: Tensor) -> bool:
    """Whether hidden states are equal at the real tokens, up to half of the digits they have."""
    assert found is not None and expected is not None
    limit = torch.finfo(expected.dtype).eps ** 0.5 * expected[real].norm()
    return bool((found - expected)[real].norm() <= limit)
