"""`deltatune study performance` and the other experiments: a command for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import typer

from deltatune.cli.compare import fields_of
from deltatune.cli.options import (
    At,
    Backbone,
    BatchSize,
    Budget,
    Config,
    Data,
    DryRun,
    Extend,
    Methods,
    On,
    Out,
    Per,
    Protocol,
    Rates,
    Retry,
    Rows,
    SearchTasks,
    Seeds,
    Set,
    Slots,
    Steps,
    Tasks,
    Trunk,
    gather,
    how_of,
    requested,
)
from deltatune.cli.output import resumable, show, warn

if TYPE_CHECKING:
    from deltatune.study.experiment import Study
    from deltatune.study.findings import Findings

__all__ = ["EXPERIMENTS", "carry_out", "command_of", "show_findings", "show_plan"]

# Here as text, so that the list of commands costs no import; a test holds them to the experiments.
EXPERIMENTS: Mapping[str, str] = MappingProxyType(
    {
        "performance": "every method on every task, beside the paper's scores (Table 1)",
        "convergence": "how soon each method is near its end, in steps and in seconds (Fig. 1,"
        " Extended Data Fig. 1 and 2)",
        "efficiency": "memory of a step by batch and backbone, and its time by the length of the"
        " input (Fig. 2, Extended Data Fig. 3)",
        "combination": "every subset of several deltas at once, with all rows and with 16 of each"
        " label (Table 2, Extended Data Table 2)",
        "sequence": "the same deltas one after the other, in every order (Extended Data Fig. 4)",
        "gap": "how much better each method does on the rows that it was trained on (Extended Data"
        " Table 3)",
        "scale": "what grows with the backbone: scores, and how soon they are reached (Fig. 3)",
        "transfer": "what a delta trained on one task does on others, as it is (Extended Data Fig."
        " 5)",
        "zero-shot": "what the backbone does untrained, beside chance (Table 2)",
        "size": "whether score and convergence depend on a delta's size or on its kind (section"
        " Theoretical and experimental analysis)",
        "review": "methods of every category of Xu et al.: score, size and memory (Tables 2 and 3)",
        "forgetting": "what training on a task costs elsewhere, with the delta on and off"
        " (Applications)",
    }
)
# An option -> the field of a comparison that an experiment may have a value for.
_FIELDS = {"backbone": "backbones", "tasks": "tasks", "methods": "methods"}


def command_of(name: str) -> Callable[..., None]:
    """The command of an experiment. All of them take the same options."""

    def command(
        context: typer.Context,
        backbone: Backbone = None,
        tasks: Tasks = None,
        methods: Methods = None,
        at: At = None,
        steps: Steps = None,
        budget: Budget = None,
        seeds: Seeds = None,
        learning_rates: Rates = None,
        search_tasks: SearchTasks = None,
        extend: Extend = None,
        per: Per = None,
        batch_size: BatchSize = None,
        together: Slots = None,
        trunk_cache: Trunk = None,
        on: On = None,
        protocol: Protocol = None,
        data: Data = None,
        train_rows: Rows = None,
        validation_rows: Rows = None,
        test_rows: Rows = None,
        out: Out = None,
        retry: Retry = False,
        config: Config = None,
        changes: Set = None,
        dry_run: DryRun = False,
    ) -> None:
        from deltatune.study.experiments import find_experiment

        experiment = find_experiment(name)
        needed = [option for option, field in _FIELDS.items() if field not in experiment.defaults]
        values = gather(config, changes, requested(context), needed=(*needed, "out"))
        folder, how = Path(values.pop("out")), how_of(values)
        study = experiment.study(**fields_of(values))
        show_plan(study) if dry_run else carry_out(study, folder, retry=retry, **how)

    told = EXPERIMENTS[name]
    command.__doc__ = f"{told[0].upper()}{told[1:]}."
    return command


def carry_out(study: Study, folder: Path, **how: object) -> None:
    """Runs a study, shows it and writes its page; exit code 1 if cells failed."""
    from deltatune import api
    from deltatune.cli.progress import choose_watch

    with resumable(), choose_watch() as watch:
        found = api.study(study, folder, watch=watch, **how)  # type: ignore[arg-type]
    show_findings(found, folder)
    if found.failures:
        warn(
            f"deltatune: {found.failures} cells failed; `deltatune study status {folder} --traces`"
            " shows why. --retry tries them again."
        )
        raise typer.Exit(1)


def show_findings(found: Findings, folder: Path) -> None:
    """Shows what a study found and writes its page."""
    from deltatune.cli.sections import as_text
    from deltatune.study.findings import write_findings

    for section in found.sections:
        show(*as_text(section))
    show(f"report: {write_findings(found, folder / 'report.html')}")


def show_plan(study: Study) -> None:
    """Says what would be run."""
    for name, part in study.parts.items():
        searched = len(part.arms) * (len(part.search_tasks) or len(part.tasks))
        final = len(part.arms) * len(part.tasks) * part.seeds
        show(
            f"{name or study.experiment}: {part.budget}; methods: {len(part.methods)}, backbones: "
            f"{len(part.backbones)}, tasks: {len(part.tasks)}, seeds: {part.seeds}; cells: "
            f"{searched * part.grid.tried * part.selection_seeds} to choose learning rates, then "
            f"at most {final}"
        )
        show(*(f"  {method}" for method in part.methods))
