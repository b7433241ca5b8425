from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from deltatune.core.errors import ArtefactError, ConfigurationError, TrainingError
from deltatune.training.log import Log


def lines(folder: Path) -> list[object]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_event_is_a_line_at_once(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.write("step", loss=0.1)
    log.write("end")
    assert lines(tmp_path) == [{"event": "step", "loss": 0.1}, {"event": "end"}]
    assert log.lines == 2
    log.close()


def test_a_log_is_cut_back_and_goes_on(tmp_path: Path) -> None:
    first = Log(tmp_path)
    for step in range(5):
        first.write("step", step=step)
    first.close()
    second = Log(tmp_path)
    second.cut(2)
    second.write("step", step="two")
    second.flush()
    assert lines(tmp_path) == [{"event": "step", "step": step} for step in (0, 1, "two")]
    assert second.lines == 3
    second.close()


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "a"}\n{"ev')
    log = Log(tmp_path)
    log.cut(1)
    log.close()
    assert lines(tmp_path) == [{"event": "a"}]


@pytest.mark.parametrize("text", ["", '{"event": "a"}\n', '{"event": "a"}\n{"ev'])
def test_a_log_that_lost_lines_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    log = Log(tmp_path)
    with pytest.raises(ArtefactError, match="its checkpoint counts 2"):
        log.cut(2)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == text


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    first = Log(tmp_path)
    first.write("start")
    with pytest.raises(ConfigurationError, match="Another process trains"):
        Log(tmp_path)
    first.close()
    Log(tmp_path).close()
    assert len(lines(tmp_path)) == 1


def test_without_a_folder_nothing_is_written() -> None:
    log = Log(None)
    log.write("step")
    log.cut(0)
    log.flush()
    log.close()
    assert log.lines == 0


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    class Full:
        name = "log.jsonl"

        def __init__(self, takes: int | None) -> None:
            self.takes = takes

        def write(self, line: bytes) -> int:
            if self.takes is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.takes

    log = Log(tmp_path)
    log.close()
    for takes, said in ((None, r"No space left.*Free space"), (3, r"No space left.*Free space")):
        log._file = Full(takes)  # type: ignore[assignment]
        with pytest.raises(TrainingError, match=said):
            log.write("step")
