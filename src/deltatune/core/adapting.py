"""Adapting at test time: a few steps of one slot on what is at hand, which are undone bit for bit.

What the steps go down is any loss that the caller computes (UDDIA, Yang et al. 2023: biases, while
a text is generated), or how far activations stray from those of training, which a method measures
itself (robust prefix-tuning, Yang and Liu 2022). No label is needed, and what is stored never
changes.

Activations are read behind every block that holds a site, one vector for each row: where the next
token is asked for, in a decoder (the last token of the prompt, the first of a decoder behind an
encoder), and in an encoder the mean over all tokens that are no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.calls import bound, parameter_names
from deltatune.core.chain import Inner
from deltatune.core.delta import Delta
from deltatune.core.errors import ConfigurationError, StateError, TrainingError, UnsupportedError
from deltatune.core.link import Link
from deltatune.core.policy import Found
from deltatune.core.roles import block_path
from deltatune.core.text import Text, is_causal, text_of, token_stack

__all__ = ["Adaptation", "adapting", "strayed", "survey_activations"]

Right = Callable[[Any, Mapping[str, Tensor]], Tensor]


class Adaptation:
    """One slot on its way, see `adapting`."""

    def __init__(self, row: nn.Parameter, learning_rate: float) -> None:
        self._row = row
        self._optimiser = torch.optim.Adam([row], lr=learning_rate)

    def take(self, steps: int, loss: Callable[[], Tensor]) -> list[float]:
        """Takes steps of Adam, whose moments go on from those that it has taken before.

        Args:
            steps: how many; 0 leaves all as it is.
            loss: calls the model and gives one number that depends on the slot.

        Returns the loss before each step.

        Raises:
            ConfigurationError: the loss is no single number with a graph to the slot.
            TrainingError: it is not finite.
        """
        found: list[float] = []
        for _ in range(steps):
            with torch.enable_grad():
                value = loss()
                if value.numel() != 1 or not value.requires_grad:
                    raise ConfigurationError(
                        "What is minimised at test time is one number that depends on the delta; "
                        f"found {tuple(value.shape)}, "
                        f"{'with' if value.requires_grad else 'without'} a graph."
                    )
                (gradient,) = torch.autograd.grad(value.sum(), self._row, allow_unused=True)
            if gradient is None:
                raise ConfigurationError("The loss does not depend on the slot that is adapted.")
            if not torch.isfinite(value) or not gradient.isfinite().all():
                raise TrainingError(
                    f"A step at test time has a loss of {float(value.detach())}, or a gradient, "
                    "that is not finite. Take fewer steps, or smaller ones."
                )
            self._row.grad = gradient
            self._optimiser.step()
            self._row.grad = None
            found.append(float(value.detach()))
        return found


@contextmanager
def adapting(delta: Delta, *, learning_rate: float, slot: int = 0) -> Iterator[Adaptation]:
    """Within it one slot may take steps, and all rows use it; then it is as before, bit for bit.

    Nothing else may use or train the slot meanwhile, in other threads either.

    Args:
        delta: attached, in evaluation mode like its model.
        learning_rate: of Adam.
        slot: which.

    Raises:
        ConfigurationError: there is no such slot.
        StateError: the delta is detached or merged, trains in place or is in training mode, or
            inference mode forbids gradients.
    """
    row = _row(delta, slot)
    if torch.is_inference_mode_enabled():
        raise StateError("Inference mode knows no gradients. Use torch.no_grad() around it.")
    kept, gradient, trained = row.detach().clone(), row.grad, row.requires_grad
    row.grad = None
    row.requires_grad_(True)
    try:
        with delta.route([slot]):
            yield Adaptation(row, learning_rate)
    finally:
        with torch.no_grad():
            row.copy_(kept)
        row.requires_grad_(trained)
        row.grad = gradient


def strayed(delta: Delta, forward: Callable[[], object], *, slot: int = 0) -> Tensor:
    """How far a forward strays from the activations of training, summed over blocks and rows.

    Args:
        delta: attached, with a method that measures it (`robust_prefix`).
        forward: calls the model, once.
        slot: whose measure it is; the rows use it.

    Raises:
        ConfigurationError: no method measures it, or there is no such slot.
        StateError: see `adapting`; or no block was called.
        UnsupportedError: a block has other tokens than the text.
    """
    links, held = _measuring(delta, slot), delta.tensors(slot)
    with delta.route([slot]), _watching(delta, links) as seen:
        forward()
    if not seen:
        raise StateError("The forward called no block, so nothing of it can be measured.")
    terms = [
        link.method.stray(seen[path], {n: held[full].to(seen[path].dtype) for n, full in names})
        for path, link in links.items()
        if path in seen and (names := link.names.items())
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def survey_activations(
    delta: Delta,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    correct: Right | None = None,
    slot: int = 0,
) -> int:
    """Shows a trained delta the activations of training rows that it answers correctly; its method
    keeps what it needs of them in leaves that are stored.

    Args:
        delta: attached, with a method that measures how far activations stray.
        batches: arguments of the model.
        correct: (output, batch) to [rows] bool; None compares the logits with `labels`, of which
            all that are asked for must be right.
        slot: which.

    Returns how many rows were kept.

    Raises:
        TrainingError: no row was answered correctly.
        ConfigurationError: there are no labels to compare with; and see `strayed`.
        StateError, UnsupportedError: see `strayed`.
    """
    links, sums, count = _measuring(delta, slot), dict[str, Tensor](), 0
    for batch in batches:
        with delta.route([slot]), _watching(delta, links) as seen:
            output = delta.model(**batch)
        right = _right(delta, output, batch) if correct is None else correct(output, batch)
        for path, h in seen.items():
            h = h[right].double()
            sums[path] = sums.get(path, 0) + h.mT @ h
        count += int(right.sum())
    if not count:
        raise TrainingError("No row was answered correctly, so no activations are those to keep.")
    held = delta.tensors(slot)
    for part in delta.parts:
        found = [
            Found(
                link.site,
                {name: held[full] for name, full in link.names.items()},
                {"activations": sums[path] / count},
            )
            for path, link in links.items()
            if link.part == part.key and path in sums
        ]
        if found:
            part.method.settle(found, {})
    delta.saved.pop(slot, None)
    return count


def _row(delta: Delta, slot: int) -> nn.Parameter:
    delta.check_slot(slot)
    if not isinstance(delta.bank, Bank) or not delta.attached or delta.merged or delta.dropping:
        raise StateError(
            f"{delta.name} adapts at test time while it is attached, not merged and in evaluation "
            "mode, and a control that trains in place does not at all. Call eval() on the model "
            "and on the delta."
        )
    row = delta.bank.slots[slot]
    assert isinstance(row, nn.Parameter)
    return row


def _measuring(delta: Delta, slot: int) -> dict[str, Link]:
    """One link of each block whose activations a method measures, by the path of the block."""
    _row(delta, slot)
    links: dict[str, Link] = {}
    for link in delta.links:
        if link.method.strays() and link.site.place is not None and link.site.block is not None:
            links.setdefault(block_path(link.site.place), link)
    if not links:
        raise ConfigurationError(
            f"No method of {delta.name} measures how far activations stray. Use robust_prefix, or "
            "give a loss of your own to `take`."
        )
    return links


def _right(delta: Delta, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels")
    logits: Tensor = output.logits
    if labels is None or labels.is_floating_point():
        raise ConfigurationError(
            "Rows that were answered correctly are found by labels of classes or tokens. Give "
            "`labels` in the batches, or say by `correct` which rows are to be kept."
        )
    if logits.dim() == 2:
        return logits.argmax(-1) == labels
    if not getattr(getattr(delta.model, "config", None), "is_encoder_decoder", False):
        logits, labels = logits[:, :-1], labels[:, 1:]  # an output speaks of the next token
    return ((logits.argmax(-1) == labels) | (labels < 0)).all(-1)


@contextmanager
def _watching(delta: Delta, links: Mapping[str, Link]) -> Iterator[dict[str, Tensor]]:
    """Within it the activations of each row behind the blocks are collected, [rows, width]."""
    host, seen = delta.host, dict[str, Tensor]()
    stacks: dict[str, _Reading] = {}
    placed: list[tuple[nn.Module, _Reading | _Behind]] = []
    for path, link in links.items():
        stack = token_stack(host.model, path)
        if stack is None:
            raise UnsupportedError(
                f"{path} lies in no token stack, so which of its tokens are real is not known."
            )
        if stack not in stacks:
            module = host.model.get_submodule(stack)
            stacks[stack] = _Reading(link, stack, parameter_names(module))
            placed.append((module, stacks[stack]))
        behind = _Behind(path, stacks[stack], seen)
        placed.append((host.model.get_submodule(path), behind))
    for module, around in placed:
        chain = host.chain(module)
        chain.arounds.insert(int(host.opens(module)), around)
    try:
        yield seen
    finally:
        for module, around in placed:
            host.chain(module).arounds.remove(around)
        host.sweep()


@dataclass(eq=False)
class _Reading:
    """Around a token stack: the text of its call."""

    link: Link
    path: str
    names: tuple[str, ...]  # of the stack's arguments
    text: Text | None = None

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host, given = self.link.delta.host, bound(self.names, args, kwargs)
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        causal = is_causal(host, self.path)
        self.text = text_of(given, host, self.link.method.name, causal, past)
        return inner(*args, **kwargs)


@dataclass(eq=False)
class _Behind:
    """Around a block: what it gives, one vector for each row."""

    path: str
    reading: _Reading
    seen: dict[str, Tensor]

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, text = inner(*args, **kwargs), self.reading.text
        y = output[0] if isinstance(output, tuple) else output
        if text is None or y.shape[:2] != text.prompt.shape:
            raise UnsupportedError(
                f"{self.path} has other tokens than the text. Leave out what packs rows or puts "
                "virtual tokens in front of them."
            )
        self.seen[self.path] = _of_rows(y, text)
        return output


def _of_rows(y: Tensor, text: Text) -> Tensor:
    """One vector of [rows, tokens, width] for each row; see the top."""
    if not text.causal:
        real = text.real.unsqueeze(-1).to(y.dtype)
        return (y * real).sum(1) / real.sum(1).clamp_min(1)
    if text.source is not None:
        return y[:, 0]
    asking = text.prompt | ~text.prompt.any(-1, keepdim=True)
    last = (asking * torch.arange(text.tokens, device=y.device)).argmax(-1)
    return y[torch.arange(len(y), device=y.device), last]
