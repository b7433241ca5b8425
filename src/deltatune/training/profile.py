"""What one training step costs: bytes by what holds them, and the time of its parts.

The bytes of tensors are counted, not guessed: what the model holds, what autograd keeps between
forward and backward, gradients, the optimiser's state. Beside them stands the highest memory that
was really taken, which also holds what lives for a moment within an operation.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from deltatune.training.forward import forward_context
from deltatune.training.memory import peak_device_memory, peak_memory, reset_peaks
from deltatune.training.optim import build_optimiser
from deltatune.training.settings import Settings
from deltatune.training.trainable import Trainable

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile:
    """One step, in bytes and seconds.

    Attributes:
        static: parameters and buffers, those of the delta among them.
        activations: kept between forward and backward, beyond what `static` counts.
        gradients: of what is trained.
        optimiser: its state after the first step.
        peak: the highest that was taken, `static` included.
        forward, backward, update: the shortest time of each, of the repeats.
    """

    static: int
    activations: int
    gradients: int
    optimiser: int
    peak: int
    forward: float
    backward: float
    update: float

    @property
    def counted(self) -> int:
        """What the counted tensors come to: the model of memory that `peak` is held against."""
        return self.static + self.activations + self.gradients + self.optimiser


def profile(
    run: Trainable, batch: Mapping[str, Tensor] | None, settings: Settings, *, repeats: int = 5
) -> Profile:
    """Takes steps on one batch and measures them. What is trained changes.

    Args:
        run: what is trained, on its device.
        batch: keyword arguments of the run, with labels; None: nothing is computed, and all but
            `static` and `peak` is zero.
        settings: optimiser and precision; the learning rate must be set.
        repeats: how many steps after the first.

    Raises:
        ConfigurationError: see `build_optimiser`.
    """
    model = cast(nn.Module, run)
    held = [*model.parameters(), *model.buffers()]
    static = _bytes(held)
    if batch is None:
        return Profile(static, 0, 0, 0, static, 0.0, 0.0, 0.0)
    device = held[0].device
    inputs = {name: value.to(device) for name, value in batch.items()}
    optimiser = build_optimiser(run, settings)
    before = _begin()
    saved, times = _Saved(held), list[tuple[float, float, float]]()
    run.train()
    for step in range(repeats + 1):
        run.set_step(step)
        with forward_context(model, settings.precision, device, inputs), saved.watching(step == 0):
            loss, forward = _timed(lambda: run(**inputs).loss, device)
        _, backward = _timed(loss.backward, device)
        gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        _, update = _timed(optimiser.step, device)
        optimiser.zero_grad()
        times.append((forward, backward, update))
    run.eval()
    state = _bytes(v for s in optimiser.state.values() for v in s.values() if torch.is_tensor(v))
    peak = peak_device_memory() or static + max(0, peak_memory() - before)
    shortest = (min(part) for part in zip(*times[1:], strict=True))
    return Profile(static, saved.total, gradients, state, peak, *shortest)


class _Saved:
    """What autograd keeps, each storage once, without that of given tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.total = 0

    def watching(self, wanted: bool) -> Any:
        """Within it what is kept is counted, where that is wanted: it takes time."""
        if not wanted:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _begin() -> int:
    """Gives back what is free, starts the measurement, and returns the resident memory."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peaks()
    return int(psutil.Process().memory_info().rss)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    started = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - started


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
