"""`deltatune study run`: a study that a file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli.compare import fields_of
from deltatune.cli.options import (
    Data,
    DryRun,
    On,
    Out,
    Retry,
    Set,
    Slots,
    Trunk,
    gather,
    how_of,
    requested,
)
from deltatune.cli.study.experiments import carry_out, show_plan

__all__ = ["run"]

# What a file may say beside the options of this command.
_KEYS = (
    *("experiment", "parts", "backbone", "tasks", "methods", "at"),
    *("steps", "budget", "budgets", "seeds"),
    *("learning_rates", "search_tasks", "selection", "selection_seeds", "extend", "per"),
    *("batch_size", "by_method"),
    *("protocol", "protocols", "train_rows", "validation_rows", "test_rows"),
)


def run(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML file.", metavar="FILE")],
    together: Slots = None,
    trunk_cache: Trunk = None,
    on: On = None,
    data: Data = None,
    out: Out = None,
    retry: Retry = False,
    changes: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Run a study that a file describes.

    Its keys are the options of `compare`, with underscores; `protocols` and `budgets` for several
    of them; `experiment` for one of the others, instead of a plain grid. Or it is the study.json
    that a report ends with: `experiment` and `parts`.
    """
    given: dict[str, Any] = {**dict.fromkeys(_KEYS), **requested(context, but="file")}
    values = gather(file, changes, given, needed=("out",))
    folder, how = Path(values.pop("out")), how_of(values)
    study = _study(values)
    if dry_run:
        show_plan(study)
        return
    carry_out(study, folder, retry=retry, **how)


def _study(values: dict[str, Any]) -> Any:
    from deltatune.core.errors import ConfigurationError
    from deltatune.study.comparison import Comparison
    from deltatune.study.experiment import GRID, Study
    from deltatune.study.experiments import find_experiment
    from deltatune.study.experiments.grid import crossed

    name = values.pop("experiment", None)
    if "parts" in values:
        parts = values.pop("parts")
        if left := [key for key, value in values.items() if value is not None]:
            raise ConfigurationError(
                f"A file with `parts` says all of a study but `experiment`. Leave "
                f"{', '.join(left)} out."
            )
        return Study(experiment=find_experiment(str(name or GRID)).name, parts=parts)
    protocols, budgets = (_several(values, key) for key in ("protocols", "budgets"))
    fields = fields_of(values)
    if name is None:
        return crossed(Comparison(**fields), protocols, budgets)
    if protocols or budgets:
        raise ConfigurationError(
            f"The experiment {name!r} has one protocol and one budget. Give `protocol` and "
            "`budget`, or leave `experiment` out."
        )
    return find_experiment(str(name)).study(**fields)


def _several(values: dict[str, Any], key: str) -> list[str]:
    found = values.pop(key, None) or []
    return [str(one) for one in (found if isinstance(found, list) else [found])]
