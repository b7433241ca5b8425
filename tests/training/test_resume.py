"""A killed run goes on as if nothing had happened: the same bits, the same log but for times.

Processes are killed with SIGKILL, by themselves at chosen moments or from outside at random ones.
They come from a fork server that has imported torch already, so that a kill costs little.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training import killed
from tests.training.standin import StandIn, collate, events, make_rows, quick

from deltatune.training import Result, Steps, fit
from deltatune.training.optim import optimiser_names
from deltatune.training.sampler import Sampler
from deltatune.training.state import RunState

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deltatune.training.loop", "torch._dynamo"])


def started(folder: Path, **options: Any) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=killed.train, args=(folder,), kwargs=options)
    process.start()
    return process


def ended(folder: Path, **options: Any) -> int | None:
    """Runs to the end, by itself or killed; returns the exit code."""
    process = started(folder, **options)
    process.join(120)
    return process.exitcode


def content(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.safetensors",
        "log.jsonl",
    ]
    return load_file(folder / "checkpoint.safetensors"), events(folder)


def assert_same(folder: Path, whole: Path) -> None:
    tensors, lines = content(folder)
    expected_tensors, expected_lines = content(whole)
    assert lines == expected_lines
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[name], held) for name, held in expected_tensors.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(folder) == 0
    assert len(events(folder, "step")) == killed.STEPS
    return folder


def test_killed_at_many_steps(whole: Path, tmp_path: Path) -> None:
    forwards = 2 * killed.STEPS
    moments = [0, *sorted(random.Random(5).sample(range(1, forwards), 6)), forwards - 1]
    for moment in moments:
        assert ended(tmp_path / "run", kill_at=moment) == -signal.SIGKILL
    assert ended(tmp_path / "run") == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("mixed", [False, True])
def test_killed_while_training_on_several_tasks(mixed: bool, tmp_path: Path) -> None:
    assert ended(tmp_path / "whole", mixed=mixed) == 0
    for moment in (5, 13, 22):
        assert ended(tmp_path / "run", kill_at=moment, mixed=mixed) == -signal.SIGKILL
    assert ended(tmp_path / "run", mixed=mixed) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert {name for step in events(tmp_path / "run", "step") for name in step["tasks"]} == {
        "many",
        "few",
    }


@pytest.mark.parametrize("moment", ["torn", "written", "moved", "line"])
def test_killed_while_writing(moment: str, whole: Path, tmp_path: Path) -> None:
    """In the first write, in later ones, and in the last one."""
    assert ended(tmp_path / "run", moment=moment) == -signal.SIGKILL
    for count in (1, 2, 3):
        assert ended(tmp_path / "run", moment=moment, count=count) in (0, -signal.SIGKILL)
    assert ended(tmp_path / "run") == 0
    assert_same(tmp_path / "run", whole)


def test_killed_at_random_times(tmp_path: Path) -> None:
    """With checkpoints so large and so frequent that many a kill falls into one."""
    large = {"width": 20_000, "every": 1, "steps": 60}
    assert ended(tmp_path / "whole", **large) == 0
    draw = random.Random(11)
    for _ in range(10):
        ready = CONTEXT.Event()
        process = started(tmp_path / "run", ready=ready, **large)
        assert ready.wait(120)
        process.join(draw.uniform(0.0, 0.25))
        process.kill()
        process.join(120)
    assert ended(tmp_path / "run", **large) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path) -> None:
    """A limit on the size of files: the first checkpoint fits, the next one, with moments, not."""
    folder, answers = tmp_path / "run", CONTEXT.SimpleQueue()
    options = {"width": 500, "largest_file": 40_000}
    process = CONTEXT.Process(target=killed.train_into, args=(answers, folder), kwargs=options)
    process.start()
    process.join(120)
    assert answers.get().startswith("TrainingError: A checkpoint could not be written")
    content(folder)
    assert len(events(folder, "step")) == 3
    assert ended(folder, width=500) == ended(tmp_path / "whole", width=500) == 0
    assert_same(folder, tmp_path / "whole")


class Interrupted(Exception):
    """Ends a run from within, at a forward pass."""


@pytest.mark.parametrize("name", [name for name in optimiser_names() if name != "muon"])
def test_every_optimiser_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    class Interrupting(StandIn):
        def set_step(self, step: int) -> None:
            if step == 7:
                raise Interrupted
            super().set_step(step)

    def end(run: StandIn, folder: Path | None) -> list[torch.Tensor]:
        arguments: dict[str, Any] = {"settings": quick(optimiser=name), "budget": Steps(11)}
        fit(run, make_rows(22), collate, folder=folder, **arguments)
        return [*run.trainable_state().values()]

    with pytest.raises(Interrupted):
        end(Interrupting(), tmp_path)
    resumed, whole = StandIn(), end(StandIn(), None)
    assert all(map(torch.equal, end(resumed, tmp_path), whole))
    assert resumed.steps == [6, 7, 8, 9, 10]


def test_bits_below_the_parameters_precision_are_kept(tmp_path: Path) -> None:
    """Moments may be finer than the parameter: nothing is cast on the way."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    moment = torch.tensor([1.0 + 2**-20, 3.0])

    def fresh() -> RunState:
        optimiser = torch.optim.AdamW([parameter], lr=0.1)
        return RunState.begin(Sampler(4, 2, 0), optimiser, StandIn().policies())

    state, other = fresh(), fresh()
    state.optimiser.state[parameter].update({"exp_avg": moment, "step": 3, "nothing": None})
    other.restore(json.loads(json.dumps(state.record())), state.tensors())
    held = other.optimiser.state[parameter]
    assert torch.equal(held["exp_avg"], moment) and held["exp_avg"].dtype is torch.float32
    assert held["step"] == 3 and held["nothing"] is None


def test_the_result_is_that_of_the_whole_run(whole: Path, tmp_path: Path) -> None:
    assert ended(tmp_path / "run", kill_at=17) == -signal.SIGKILL
    resumed, expected = killed.train(tmp_path / "run"), killed.train(whole)

    def without_times(result: Result) -> Any:
        points = [(point.step, point.scores) for point in result.history]
        kept = result.steps, result.epochs, result.rows, result.tokens, result.losses
        return kept, points, result.best_step, result.kept_step, result.ending

    assert without_times(resumed) == without_times(expected)
    assert len({point.scores["accuracy"] for point in expected.history}) > 1
