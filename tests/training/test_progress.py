from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from tests.training.standin import StandIn, collate, make_rows, quick

from deltatune.core.errors import TrainingError
from deltatune.training import Epochs, choose_progress, fit
from deltatune.training.progress import PlainProgress, Progress, RichProgress, SilentProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    assert isinstance(choose_progress(Terminal()), RichProgress)
    assert isinstance(choose_progress(io.StringIO()), PlainProgress)


def trained(progress: Progress) -> None:
    fit(
        StandIn(),
        make_rows(22),
        collate,
        settings=quick(evaluation_every=6),
        budget=Epochs(5),
        validate=lambda: {"accuracy": 0.5, "f1": float("nan")},
        progress=progress,
    )


def test_lines_when_piped() -> None:
    stream = io.StringIO()
    trained(PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training for 5 epochs"
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    tenths = [f"{percent:3}% step" for percent in range(10, 101, 10)]
    assert [line[:9] for line in lines if "loss" in line] == tenths
    assert lines.count("step 6 validation accuracy 0.5000 f1 not finite") == 1


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    trained(RichProgress(Console(file=stream, force_terminal=True, width=120)))
    assert "100%" in stream.getvalue() and "accuracy 0.5000" in stream.getvalue()


def test_messages_are_shown_as_they_are() -> None:
    stream, terminal = io.StringIO(), Terminal()
    PlainProgress(stream).say("[7 rows]")
    RichProgress(Console(file=terminal)).say("[7 rows]")
    assert stream.getvalue() == "[7 rows]\n" and "[7 rows]" in terminal.getvalue()


def test_silence(capsys: object) -> None:
    trained(SilentProgress())
    assert capsys.readouterr() == ("", "")  # type: ignore[attr-defined]


def test_going_on_is_said(tmp_path: Path) -> None:
    stream = io.StringIO()
    for poisoned in (4, -1, -1):
        run = StandIn()
        run.poisoned = poisoned
        with suppress(TrainingError):
            fit(
                run,
                make_rows(22),
                collate,
                settings=quick(),
                budget=Epochs(1),
                folder=tmp_path,
                progress=PlainProgress(stream),
            )
    lines = stream.getvalue().splitlines()
    assert lines.count("goes on after step 3") == 1 and lines[-1] == "done after step 6"
