"""The passes of one step that many runs share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.training.batch import count_tokens, loss_items, row_length
from deltatune.training.forward import forward_context
from deltatune.training.loop import Loop
from deltatune.training.losses import inputs_without_loss, row_losses
from deltatune.training.parts import cut
from deltatune.training.step import Chosen, Collate

__all__ = ["SharedPasses"]


@dataclass(frozen=True)
class SharedPasses:
    """Takes the rows of many runs through one base, each to the slot of its run.

    Attributes:
        delta, collate, tokens: see `fit_many`.
        accelerator: where the base is; takes the gradients.
    """

    delta: Delta
    collate: Collate
    tokens: int
    accelerator: Accelerator

    def gradients(
        self, loops: Mapping[int, Loop], chosen: Mapping[int, Chosen]
    ) -> dict[int, float]:
        """Adds to every slot the gradient of its run's mean loss.

        Args:
            loops: slot to the run that has it.
            chosen: slot to the rows of its step.

        Returns:
            Slot to that loss.
        """
        device = self.accelerator.device
        parts = [(slots, self._batch(loops, rows)) for slots, rows in self._parts(loops, chosen)]
        items = dict.fromkeys(chosen, 0)
        for slots, batch in parts:
            for k, count in zip(slots, loss_items(batch["labels"]).tolist(), strict=True):
                items[k] += count
        losses = dict.fromkeys(chosen, 0.0)
        for slots, batch in parts:
            held = {name: value.to(device) for name, value in batch.items()}
            each = self._losses(next(iter(loops.values())), slots, held)
            shares = torch.tensor([1 / max(items[k], 1) for k in slots], device=device)
            for k, value in zip(slots, (each.detach() * shares).tolist(), strict=True):
                losses[k] += value if items[k] else math.nan
            self.accelerator.backward((each * shares).sum())
        for slot in chosen:
            loops[slot].taker.penalise()
        return losses

    def _parts(
        self, loops: Mapping[int, Loop], chosen: Mapping[int, Chosen]
    ) -> list[tuple[list[int], list[tuple[int, Any]]]]:
        """The rows of all runs by length, in parts that keep to the budget, runs in order."""
        visited = {k: loops[k].taker.visit(loops[k].state, one.rows) for k, one in chosen.items()}
        rows = [(k, row) for k, seen in visited.items() for row in seen]
        lengths = [row_length(row) for _, row in rows]
        packed = next(iter(loops.values())).taker.settings.packing
        parts = [
            [rows[place] for place in sorted(part)]
            for part in cut(lengths, self.tokens, packed=packed, device=self.accelerator.device)
        ]
        return [([k for k, _ in part], part) for part in parts]

    def _batch(
        self, loops: Mapping[int, Loop], rows: Sequence[tuple[int, Any]]
    ) -> Mapping[str, Tensor]:
        """The rows as one batch; their tokens are counted by run."""
        batch = self.collate([row for _, row in rows])
        for place, (k, _) in enumerate(rows):
            one = {name: value[place : place + 1] for name, value in batch.items()}
            loops[k].state.facts.tokens += count_tokens(one)
        return batch

    def _losses(self, any_run: Loop, slots: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
        """[rows], see `row_losses`; precision and packing are the same for all runs."""
        model, taker = self.delta.model, any_run.taker
        context = forward_context(model, taker.settings.precision, self.accelerator.device, batch)
        labelled = self.delta.host.labels.set(batch["labels"])  # which the model does not get
        with self.delta.route(slots), taker.packed(), context, labelled:
            logits = model(**inputs_without_loss(model, batch)).logits
        return row_losses(model, logits, batch["labels"])
