"""`deltatune compare`: methods by tasks by seeds, resumed where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import (
    At,
    Backbone,
    BatchSize,
    Budget,
    Config,
    Data,
    DryRun,
    Json,
    Protocol,
    Rows,
    Set,
    Steps,
    Trunk,
    budget_of,
    gather,
    nested,
    requested,
    trunk_cache_of,
)
from deltatune.cli.output import print_json, resumable, show, warn

if TYPE_CHECKING:
    from deltatune.study.comparison import Comparison
    from deltatune.study.summary import Summary

__all__ = ["compare"]


def compare(
    context: typer.Context,
    backbone: Backbone = None,
    tasks: Annotated[
        str | None, typer.Option(help="Task ids with commas between.", metavar="LIST")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods: 'full,lora(rank=4, alpha=8),bitfit'.", metavar="LIST"),
    ] = None,
    at: At = None,
    steps: Steps = None,
    budget: Budget = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Rates that every arm tries on validation: '1e-4,3e-4,1e-3', or"
            " 'x0.3,x1,x3' for factors of each method's preset.",
            metavar="LIST",
        ),
    ] = None,
    search_tasks: Annotated[
        str | None,
        typer.Option(help="Try the rates on these of the tasks alone.", metavar="LIST"),
    ] = None,
    extend: Annotated[
        int | None, typer.Option(help="Add up to so many rates while the best is at an edge.")
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(help="One rate for each 'arm', or for each 'task'.", metavar="NAME"),
    ] = None,
    batch_size: BatchSize = None,
    together: Annotated[
        int | None,
        typer.Option(
            help="Train so many cells of an arm at once over one base: less time and memory; time"
            " is then shared, and memory is not measured."
        ),
    ] = None,
    trunk_cache: Trunk = None,
    protocol: Protocol = None,
    data: Data = None,
    train_rows: Rows = None,
    validation_rows: Rows = None,
    test_rows: Rows = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study: journal, deltas, report.html.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Only make the report of --out again.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try cells again that failed before.")
    ] = False,
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
    needed = ("out",) if report else ("backbone", "tasks", "methods", "out")
    values = gather(config, changes, requested(context), needed=needed)
    folder, source = Path(values.pop("out")), values.pop("data", None)
    wanted = values.pop("together", None)
    together = 1 if wanted is None else int(wanted)
    cache = trunk_cache_of(values)

    from deltatune import api
    from deltatune.cli.progress import choose_watch

    if report:
        summary = _stored(folder)
    elif dry_run:
        _show_plan(comparison_of(values), as_json)
        return
    else:
        with resumable(), choose_watch() as watch:
            summary = api.compare(
                comparison_of(values),
                folder,
                data=source,
                together=together,
                trunk_cache=cache,
                retry=retry,
                watch=watch,
            )
    _show(summary, folder, as_json)
    if summary.failures:
        warn(
            f"deltatune: {len(summary.failures)} cells failed; see the end of the report."
            " --retry tries them again."
        )
        raise typer.Exit(1)


def comparison_of(values: dict[str, Any]) -> Comparison:
    """Returns what is to be compared, from the values of the command."""
    from deltatune.core.grammar import split_methods
    from deltatune.study.comparison import Comparison
    from deltatune.study.select import Grid
    from deltatune.training.settings import Settings

    settings = nested(values, "settings", per_device_batch_size=values.pop("batch_size", None))
    rows = {key: values.pop(key, None) for key in ("train_rows", "validation_rows", "test_rows")}
    rates = values.pop("learning_rates", None)
    fields = {
        "budget": budget_of(values),
        "settings": Settings(**settings),
        "options": nested(values, "options", **rows),
        "backbones": _listed(values.pop("backbone"), lambda text: text.split(",")),
        "tasks": _listed(values.pop("tasks"), lambda text: text.split(",")),
        "methods": _listed(values.pop("methods"), split_methods),
        "search_tasks": _listed(
            values.pop("search_tasks", None) or [], lambda text: text.split(",")
        ),
        **({} if rates is None else {"grid": Grid.parse(",".join(_listed(rates, str.split)))}),
    }
    return Comparison(**{**values, **fields})


def _listed(value: Any, split: Any) -> tuple[str, ...]:
    """Returns a list of a file as it is, a text of the shell cut into its parts."""
    parts = value if isinstance(value, list) else split(str(value))
    return tuple(str(part).strip() for part in parts)


def _stored(folder: Path) -> Summary:
    from deltatune.study.store import open_study
    from deltatune.study.summary import summarise

    return summarise(open_study(folder))


def _show(summary: Summary, folder: Path, as_json: bool) -> None:
    from deltatune.study.page import write_page
    from deltatune.study.table import as_data, as_tables, remarks

    page = write_page(summary, folder / "report.html")
    if as_json:
        print_json({**as_data(summary), "report": str(page)})
        return
    show(*as_tables(summary), *remarks(summary), f"report: {page}")


def _show_plan(comparison: Comparison, as_json: bool) -> None:
    """Says what would be run."""
    from deltatune.study.comparison import preset

    rates = {method: comparison.grid.rates(preset(method)) for method in comparison.methods}
    arms, tasks = len(comparison.arms), len(comparison.tasks)
    looked_at = len(comparison.search_tasks) or tasks
    grid = len(comparison.grid.values)
    selection = min(comparison.selection_seeds, comparison.seeds) if grid > 1 else 0
    searched = arms * looked_at * grid * selection
    final = arms * (tasks * comparison.seeds - looked_at * selection)
    if as_json:
        counts = {"search": searched, "final": final}
        print_json({"cells": counts, "learning_rates": rates, **comparison.model_dump(mode="json")})
        return
    show(
        f"{searched} cells to choose learning rates, then {final} more, {comparison.budget} each",
        *(
            f"{method}: {', '.join(f'{rate:g}' for rate in tried)}"
            for method, tried in rates.items()
        ),
    )
