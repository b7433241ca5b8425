"""A value that every thread sets for itself, so that one thread's `with` is not another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

__all__ = ["PerThread"]

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value with a default, and what threads have put in its place for a while.

    A copy, or a pickle, has the default everywhere: it is within no `with`.

    Args:
        default: what holds where a thread has set nothing.
    """

    def __init__(self, default: T) -> None:
        self._default = self._latest = default
        self._own: dict[int, T] = {}

    def get(self) -> T:
        """The value for the thread that asks.

        The backward pass runs in a thread of its own on some devices. What it computes anew, and
        what a compiler traces, has the value that was set last.
        """
        if torch.compiler.is_compiling():
            return self._latest
        thread = threading.get_ident()
        if thread not in self._own and torch._C._current_graph_task_id() >= 0:
            return self._latest
        return self._own.get(thread, self._default)

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Within it `get` gives `value` to this thread."""
        latest = self._latest
        if torch.compiler.is_compiling():  # which knows of no threads
            self._latest = value
            try:
                yield
            finally:
                self._latest = latest
            return
        thread = threading.get_ident()
        before = self._own.get(thread)
        held = thread in self._own
        self._own[thread] = self._latest = value
        try:
            yield
        finally:
            self._latest = latest
            if held:
                self._own[thread] = before  # type: ignore[assignment]
            else:
                self._own.pop(thread, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_default": self._default, "_latest": self._default, "_own": {}}
