"""`deltatune compare`: methods by tasks by seeds, resumed where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deltatune.cli.options import (
    At,
    Backbone,
    BatchSize,
    Budget,
    Config,
    Data,
    DryRun,
    Extend,
    Json,
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
    budget_of,
    gather,
    how_of,
    nested,
    requested,
)
from deltatune.cli.output import print_json, resumable, show, warn

if TYPE_CHECKING:
    from deltatune.study.comparison import Comparison
    from deltatune.study.summary import Summary

__all__ = ["compare", "comparison_of", "fields_of", "show_summary"]


def compare(
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
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Compare methods on tasks: a table, and a report.

    Each method is trained and scored on each task, with its learning rate chosen on validation
    rows. The same command goes on where it stopped; several processes may share a folder. A cell
    that failed stays failed unless --retry is given.
    """
    needed = ("backbone", "tasks", "methods", "out")
    values = gather(config, changes, requested(context), needed=needed)
    folder, how = Path(values.pop("out")), how_of(values)

    from deltatune import api
    from deltatune.cli.progress import choose_watch

    if dry_run:
        _show_plan(comparison_of(values), as_json)
        return
    with resumable(), choose_watch() as watch:
        wanted = comparison_of(values)
        summary = api.compare(wanted, folder, retry=retry, watch=watch, **how)
    show_summary(summary, folder, as_json)
    if summary.failures:
        warn(
            f"deltatune: {len(summary.failures)} cells failed; see the end of the report."
            " --retry tries them again."
        )
        raise typer.Exit(1)


def comparison_of(values: dict[str, Any]) -> Comparison:
    """Returns what is to be compared, from the values of the command."""
    from deltatune.study.comparison import Comparison

    return Comparison(**fields_of(values))


def fields_of(values: dict[str, Any]) -> dict[str, Any]:
    """Returns fields of a comparison, from the values of a command: those that were given."""
    from deltatune.core.grammar import split_methods
    from deltatune.study.search import parse_rates
    from deltatune.training.settings import Settings

    values["budget"] = budget_of(values, default="")
    settings = nested(values, "settings", per_device_batch_size=values.pop("batch_size", None))
    rows = {key: values.pop(key, None) for key in ("train_rows", "validation_rows", "test_rows")}
    values["settings"] = Settings(**settings) if settings else None
    values["options"] = nested(values, "options", **rows)
    values["backbones"] = values.pop("backbone", None)
    listed = {
        name: (lambda text: text.split(",")) for name in ("backbones", "tasks", "search_tasks")
    }
    for name, split in {**listed, "methods": split_methods}.items():
        if values.get(name):
            values[name] = _listed(values[name], split)
    if rates := values.pop("learning_rates", None):
        values["grid"] = parse_rates(",".join(_listed(rates, lambda text: [text])))
    return {name: value for name, value in values.items() if value not in (None, "", {}, ())}


def _listed(value: Any, split: Any) -> tuple[str, ...]:
    """Returns a list of a file as it is, a text of the shell cut into its parts."""
    parts = value if isinstance(value, list) else split(str(value))
    return tuple(str(part).strip() for part in parts)


def show_summary(summary: Summary, folder: Path, as_json: bool = False) -> None:
    """Shows a comparison and writes its page."""
    from deltatune.study.page import write_page
    from deltatune.study.table import as_data, as_tables, remarks

    if as_json:
        page = write_page(summary, folder / "report.html")
        print_json({**as_data(summary), "report": str(page)})
        return
    show(*as_tables(summary), *remarks(summary))
    show(f"report: {write_page(summary, folder / 'report.html')}")


def _show_plan(comparison: Comparison, as_json: bool) -> None:
    """Says what would be run."""
    from deltatune.study.comparison import preset

    rates = {method: comparison.grid.rates(preset(method)) for method in comparison.methods}
    arms, tasks = len(comparison.arms), len(comparison.tasks)
    looked_at = len(comparison.search_tasks) or tasks
    tried = comparison.grid.tried
    selection = min(comparison.selection_seeds, comparison.seeds) if tried else 0
    searched = arms * looked_at * tried * selection
    final = arms * (tasks * comparison.seeds - looked_at * selection)
    if as_json:
        counts = {"search": searched, "final": final}
        print_json({"cells": counts, "learning_rates": rates, **comparison.model_dump(mode="json")})
        return
    show(
        f"{searched} cells to choose learning rates, then {final} more, {comparison.budget} each",
        *(
            f"{method}: {', '.join(f'{rate:g}' for rate in known) or comparison.grid}"
            for method, known in rates.items()
        ),
    )
