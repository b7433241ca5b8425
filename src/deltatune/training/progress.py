"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["PlainProgress", "Progress", "RichProgress", "SilentProgress", "choose_progress"]


class Progress(Protocol):
    """Hears of a run as it goes on. Nothing here may change the run."""

    def start(self, title: str) -> None:
        """The run begins, or goes on."""

    def step(self, step: int, fraction: float, loss: float, learning_rate: float) -> None:
        """A step was taken; `fraction` of the budget is spent."""

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """The run was evaluated."""

    def say(self, text: str) -> None:
        """Something to know."""

    def stop(self) -> None:
        """The run has ended, well or not."""


class SilentProgress:
    """Shows nothing."""

    def start(self, title: str) -> None:
        """See Progress."""

    def step(self, step: int, fraction: float, loss: float, learning_rate: float) -> None:
        """See Progress."""

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """See Progress."""

    def say(self, text: str) -> None:
        """See Progress."""

    def stop(self) -> None:
        """See Progress."""


class PlainProgress:
    """A line at each tenth of the budget, at each evaluation and for each message.

    Args:
        stream: where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tenths = 0

    def start(self, title: str) -> None:
        """See Progress."""
        self._tenths = 0
        self.say(title)

    def step(self, step: int, fraction: float, loss: float, learning_rate: float) -> None:
        """See Progress."""
        tenths = math.floor(min(fraction, 1.0) * 10)
        if tenths > self._tenths:
            self._tenths = tenths
            self.say(f"{_percent(fraction)} step {step} loss {loss:.4f} rate {learning_rate:.2e}")

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """See Progress."""
        self.say(f"step {step} validation {_scores(scores)}")

    def say(self, text: str) -> None:
        """See Progress."""
        print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        """See Progress."""


class RichProgress:
    """One bar, with loss and the latest scores.

    Args:
        console: where it is drawn.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._latest = ""

    def start(self, title: str) -> None:
        """See Progress."""
        self._task = self._bars.add_task(title, total=1.0, facts="")
        self._bars.start()

    def step(self, step: int, fraction: float, loss: float, learning_rate: float) -> None:
        """See Progress."""
        facts = f"step {step} loss {loss:.4f} {self._latest}"
        self._bars.update(self._task, completed=min(fraction, 1.0), facts=facts)

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """See Progress."""
        self._latest = _scores(scores)

    def say(self, text: str) -> None:
        """See Progress."""
        self._bars.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """See Progress."""
        self._bars.stop()


def choose_progress(stream: TextIO | None = None) -> Progress:
    """Returns a bar if `stream` (standard error by default) is a terminal, plain lines if not."""
    stream = sys.stderr if stream is None else stream
    return RichProgress(Console(file=stream)) if stream.isatty() else PlainProgress(stream)


def _percent(fraction: float) -> str:
    return f"{min(fraction, 1.0):4.0%}"


def _scores(scores: Mapping[str, float | None]) -> str:
    shown = {
        name: "not finite" if score is None else f"{score:.4f}" for name, score in scores.items()
    }
    return " ".join(f"{name} {text}" for name, text in shown.items())
