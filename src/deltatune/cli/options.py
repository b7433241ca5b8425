"""Options that several commands have, and how a file, `--set` and options become one request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from deltatune.core.errors import ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    from deltatune.training.trunk_cache import TrunkCache

__all__ = ["budget_of", "gather", "how_of", "nested", "requested", "trunk_cache_of"]

Backbone: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Embedded name (t5-mini), minilm, local folder or hub id.", metavar="NAME"),
]
Method: TypeAlias = Annotated[
    str | None, typer.Option(help="Method expression: 'lora(rank=8) + bitfit'.", metavar="EXPR")
]
At: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Target of methods that name none: 'attention.q|ffn.up'.", metavar="TARGET"),
]
Data: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Folder of task data, or 'hub'; else $DELTATUNE_DATA.", metavar="DIR"),
]
Protocol: TypeAlias = Annotated[
    str | None, typer.Option(help="How rows are split: clean or faithful.", metavar="NAME")
]
Steps: TypeAlias = Annotated[int | None, typer.Option(help="Budget in optimiser steps.")]
Budget: TypeAlias = Annotated[
    str | None, typer.Option(help="Budget in words: '2 epochs', '10 minutes'.", metavar="TEXT")
]
Rows: TypeAlias = Annotated[int | None, typer.Option(help="Use at most so many rows.")]
BatchSize: TypeAlias = Annotated[int | None, typer.Option(help="Rows of an optimiser step.")]
Config: TypeAlias = Annotated[
    Path | None, typer.Option(help="YAML file with values for these options.", metavar="FILE")
]
Set: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", help="A value over the file's: settings.warmup_steps=50.", metavar="K=V"),
]
Trunk: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--trunk-cache",
        help="Memory in GiB for what the frozen blocks below a delta give, where that pays.",
    ),
]
Tasks: TypeAlias = Annotated[
    str | None, typer.Option(help="Task ids with commas between.", metavar="LIST")
]
Methods: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Methods: 'full,lora(rank=4, alpha=8),bitfit'.", metavar="LIST"),
]
Seeds: TypeAlias = Annotated[int | None, typer.Option(help="How many seeds.")]
Rates: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Rates that every arm tries on validation: '1e-4,3e-4,1e-3', or"
        " 'x0.3,x1,x3' for factors of each method's preset;"
        " '12 of x0.1..x10' proposes twelve.",
        metavar="LIST",
    ),
]
SearchTasks: TypeAlias = Annotated[
    str | None, typer.Option(help="Try the rates on these of the tasks alone.", metavar="LIST")
]
Per: TypeAlias = Annotated[
    str | None, typer.Option(help="One rate for each 'arm', or for each 'task'.", metavar="NAME")
]
Extend: TypeAlias = Annotated[
    int | None, typer.Option(help="Add up to so many rates while the best is at an edge.")
]
Slots: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Train so many cells of an arm at once over one base: less time and memory; time"
        " is then shared, and memory is not measured."
    ),
]
On: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Train on the workers of a Ray cluster: 'ray', or 'ray:ADDRESS'.", metavar="PLACE"
    ),
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of the study: journal, deltas, report.html.")
]
Retry: TypeAlias = Annotated[
    bool, typer.Option("--retry", help="Try cells again that failed before.")
]
Study: TypeAlias = Annotated[Path, typer.Argument(help="Folder of a study.", metavar="FOLDER")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")
]

_NESTED = ("settings", "stages", "options")
_LENGTH = ("steps", "budget")  # two words for how long to train


def trunk_cache_of(values: dict[str, Any]) -> TrunkCache | None:
    """Takes the size of a trunk cache, in GiB, from the values of a command."""
    size = values.pop("trunk_cache", None)
    if size is None:
        return None
    from deltatune.training.trunk_cache import TrunkCache

    return TrunkCache(int(float(size) * (1 << 30)))


def how_of(values: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a request how and where its cells are trained."""
    slots = values.pop("together", None)
    return {
        "data": values.pop("data", None),
        "together": 1 if slots is None else int(slots),
        "trunk_cache": trunk_cache_of(values),
        "on": values.pop("on", None),
    }


def gather(
    config: Path | None,
    changes: Sequence[str] | None,
    given: Mapping[str, Any],
    *,
    needed: Collection[str] = (),
) -> dict[str, Any]:
    """Returns the values of a request: those of the file, over them `--set`, over them the options.

    Args:
        config: a YAML file, or None.
        changes: "key=value" and "settings.key=value", values in YAML.
        given: option name -> value, None for options that were not given. The names are the keys
            that are allowed, with `settings`, `stages` and `options`.
        needed: keys that must have a value in the end.

    Raises:
        ConfigurationError: a file that cannot be read, a change without "=", a value missing.
        UnknownNameError: a key that no option has.
    """
    values = {} if config is None else _read(config)
    for change in changes or ():
        path, equals, text = change.partition("=")
        if not equals:
            raise ConfigurationError(f"--set takes KEY=VALUE. Found {change!r}.")
        _put(values, path.strip().split("."), _value(text), change)
    known = {*given, *_NESTED}
    for key in values:
        if key not in known:
            raise UnknownNameError("key", key, known)
    if any(given.get(key) is not None for key in _LENGTH):  # an option is over both of the file
        values = {key: value for key, value in values.items() if key not in _LENGTH}
    values |= {key: value for key, value in given.items() if value is not None}
    missing = [f"--{key.replace('_', '-')}" for key in needed if values.get(key) is None]
    if missing:
        raise ConfigurationError(f"Give {' and '.join(missing)}, here or in the file of --config.")
    return values


def requested(context: typer.Context, but: str = "") -> dict[str, Any]:
    """Returns the options of a command that make its request, None for those not given.

    Args:
        context: of the call. Options that say how to call, not what is asked, are left out.
        but: an argument of the command that is no part of the request either.
    """
    left_out = {"config", "changes", "as_json", "dry_run", "report", "retry", but}
    return {key: value for key, value in context.params.items() if key not in left_out}


def budget_of(values: dict[str, Any], default: str = "300 steps") -> str:
    """Takes `steps` or `budget` out of a request and returns the budget in words."""
    steps, budget = values.pop("steps", None), values.pop("budget", None)
    if steps is not None and budget is not None:
        raise ConfigurationError("Give --steps or --budget, not both.")
    if steps is not None:
        return f"{steps} steps"
    return default if budget is None else str(budget)


def nested(values: dict[str, Any], key: str, **given: Any) -> dict[str, Any]:
    """Takes the mapping `key` out of a request and returns it with the options that were given."""
    found = values.pop(key, None) or {}
    if not isinstance(found, dict):
        raise ConfigurationError(f"{key} holds keys and values. Found {found!r}.")
    return {**found, **{name: value for name, value in given.items() if value is not None}}


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigurationError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is not YAML: {said}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold keys and values, 'backbone: t5-mini'.")
    # YAML reads `on` as a truth value, and it is the name of an option.
    return {
        "on" if key is True else str(key).replace("-", "_"): value for key, value in content.items()
    }


def _value(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigurationError(f"The value {text!r} of --set is not YAML: {said}.") from error
    if isinstance(value, str):  # YAML does not read 1e-3 as a number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(values: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    *parents, last = path
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigurationError(f"--set {change}: {parent} is a value and has no keys.")
        values = below
    values[last] = value
