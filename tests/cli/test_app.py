"""What holds for every command: help at once, errors in one line, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deltatune import __version__
from deltatune.cli import hub, main, tasks
from deltatune.cli import study as studies
from deltatune.cli.app import COMMANDS, GROUPS
from deltatune.cli.options import budget_of, gather, nested
from deltatune.cli.study.experiments import EXPERIMENTS
from deltatune.core.errors import ConfigurationError, UnknownNameError

Call = Callable[..., tuple[int, str, str]]
HEAVY = {"torch", "transformers", "accelerate", "numpy", "yaml", "jinja2", "sklearn", "datasets"}


@pytest.mark.parametrize("words", [[], ["--help"], ["compare", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom deltatune.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: deltatune" in run.stdout + run.stderr
    assert not HEAVY & set(run.stdout.splitlines()[-1].split())


def test_the_module_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deltatune", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"deltatune {__version__}\n"


def test_the_commands_are_these_and_each_says_what_it_does(call: Call) -> None:
    assert list(COMMANDS) == [
        *("train", "eval", "compare", "plan", "methods", "export", "doctor"),
    ]
    assert list(GROUPS) == ["tasks", "study", "hub"]
    assert {"status", "watch", "query", "export"} <= set(studies.COMMANDS)
    code, out, _ = call("--help")
    assert code == 0
    out += "".join(call(group, "--help")[1] for group in GROUPS)
    for name, command in (COMMANDS | tasks.COMMANDS | studies.COMMANDS | hub.COMMANDS).items():
        assert f"  {name}" in out
        first = (command.__doc__ or "").partition("\n")[0]
        assert " ".join(first.split()) in " ".join(out.split()), "no summary is cut short"


def test_the_options_are_these(call: Call) -> None:
    """A new option is a decision: it is added here."""
    common = {"help", "json"}
    request = {"config", "set"}
    rows = {"train-rows", "validation-rows", "test-rows"}
    study = {
        "backbone",
        "at",
        "steps",
        "budget",
        "batch-size",
        "protocol",
        "data",
        "out",
        "dry-run",
    }
    expected = {
        "train": study
        | rows
        | request
        | {"task", "method", "learning-rate", "seed", "trunk-cache"},
        "eval": request | {"task", "backbone", "split", "protocol", "data", "rows"},
        "compare": study
        | rows
        | request
        | {"tasks", "methods", "seeds", "learning-rates", "search-tasks", "extend", "per"}
        | {"retry", "together", "trunk-cache", "on"},
        "plan": request | {"backbone", "method", "at"},
        "methods": set(),
        "tasks": set(),
        "tasks show": {"data", "protocol"},
        "tasks check": {"data", "protocol", "backbone", "rows"},
        "export": {"out", "as", "backbone", "rank"},
        "doctor": {"data"},
        "study status": {"traces"},
        "study watch": {"page", "port"},
        "study report": set(),
        "study query": {"csv"},
        "study export": {"format", "out", "table"},
        **{f"hub {name}": {"hub"} for name in hub.COMMANDS},
        "hub push": {"hub", "beside"},
        "hub pull": {"hub", "trusted"},
        "hub verify": {"hub", "trusted"},
        "hub search": {"hub", "category", "largest", "least"},
        "hub tidy": {"hub", "older"},
        "hub site": {"hub", "out"},
        "hub key": set(),
        "hub sign": {"key"},
    }
    experiment = study | rows | request | {"tasks", "methods", "seeds", "learning-rates", "extend"}
    experiment |= {"retry", "together", "trunk-cache", "on", "search-tasks", "per"}
    expected |= {f"study {name}": experiment for name in EXPERIMENTS}
    expected["study run"] = {
        "together",
        "trunk-cache",
        "data",
        "out",
        "retry",
        "set",
        "dry-run",
        "on",
    }
    without_json = {"study export", "study report", "study run", "study watch"}
    without_json |= {"hub rm", "hub tidy", "hub site", "hub key", "hub sign"}
    without_json |= {f"study {name}" for name in EXPERIMENTS}
    groups = {"tasks": tasks.COMMANDS, "study": studies.COMMANDS, "hub": hub.COMMANDS}
    inner = [f"{group} {name}" for group, commands in groups.items() for name in commands]
    for name in [*COMMANDS, "tasks", *inner]:
        _, out, _ = call(*name.split(), "--help")
        words = out.replace(",", " ").split()
        found = {
            word.removeprefix("--")
            for word in words
            if word.startswith("--") and word[2:3].isalpha()
        }
        own = {"help"} if name in without_json else common
        assert found == expected[name] | own, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("methods", "lorra"), "There is no method 'lorra'. Did you mean 'lora'"),
        (("tasks", "show", "glue_rtee"), "Did you mean 'glue_rte'"),
        (("plan", "--method", "lora"), "Give --backbone"),
        (("train",), "Give --backbone and --task and --method"),
        (("study", "report", "nowhere"), "There is no study in nowhere"),
        (("train", "--config", "none.yaml"), "Cannot read none.yaml: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words: tuple[str, ...], message: str, call: Call) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("deltatune: ") and err.count("\n") == 1
    assert message in err


def test_a_file_may_say_where(tmp_path: Path) -> None:
    """YAML takes `on` for a truth value."""
    file = tmp_path / "run.yaml"
    file.write_text("on: ray\n")
    assert gather(file, None, {"on": None}) == {"on": "ray"}


def test_an_unknown_option_or_command_is_code_2(call: Call) -> None:
    assert call("plan", "--backbon", "x")[0] == 2
    assert call("plann")[0] == 2


def test_options_win_over_changes_and_changes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"task": "a", "learning-rate": 1, "settings": {"seed": 1}}))
    given = {"task": None, "learning_rate": None, "seed": 3}
    found = gather(file, ["learning_rate=1e-3", "settings.warmup_steps=5", "seed=2"], given)
    assert found == {
        "task": "a",
        "learning_rate": 1e-3,
        "seed": 3,
        "settings": {"seed": 1, "warmup_steps": 5},
    }


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("1e-3", 1e-3), ("true", True), ("null", None), ("a b", "a b")]
)
def test_values_of_changes_are_yaml(text: str, value: object) -> None:
    assert gather(None, [f"seed={text}"], {"seed": None}) == {"seed": value}


@pytest.mark.parametrize(
    ("content", "changes", "error", "message"),
    [
        ("a: [1", [], ConfigurationError, "is not YAML"),
        ("- 1", [], ConfigurationError, "must hold keys and values"),
        ("sead: 1", [], UnknownNameError, "Did you mean 'seed'"),
        ("", ["seed"], ConfigurationError, "takes KEY=VALUE"),
        ("", ["seed=[1"], ConfigurationError, "is not YAML"),
        ("", ["seed=1", "seed.a=1"], ConfigurationError, "seed is a value and has no keys"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(
    content: str, changes: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(error, match=message):
        gather(file, changes, {"seed": None})


def test_a_budget_as_an_option_is_over_the_steps_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text("steps: 160\nseed: 3\n")
    given = {"steps": None, "budget": "nothing", "seed": None}
    assert gather(file, None, given) == {"budget": "nothing", "seed": 3}
    assert gather(file, None, {**given, "budget": None}) == {"steps": 160, "seed": 3}


def test_a_budget_is_given_once() -> None:
    assert budget_of({"steps": 5}) == "5 steps"
    assert budget_of({"budget": "2 epochs"}) == "2 epochs"
    assert budget_of({}) == "300 steps"
    with pytest.raises(ConfigurationError, match="not both"):
        budget_of({"steps": 5, "budget": "2 epochs"})


def test_nested_values_are_mappings() -> None:
    assert nested({"options": {"a": 1}}, "options", b=2, c=None) == {"a": 1, "b": 2}
    with pytest.raises(ConfigurationError, match="options holds keys and values"):
        nested({"options": 3}, "options")


def test_machines_get_json_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from deltatune.cli.output import print_json

    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x"}


def test_main_exits_well_without_arguments_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deltatune", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
