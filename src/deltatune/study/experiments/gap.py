"""Gap: how much better a method does on the rows that it was trained on, with its sign."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import CellResult
from deltatune.study.claim import Claim, Found, everywhere
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.over_tasks import (
    INTERVALS,
    in_order,
    mean,
    named,
    over_tasks,
    with_interval,
)
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.summary import Spread, Summary

__all__ = ["EXPERIMENT", "gap"]

ROWS = 500  # training rows that are scored, where no other number is asked for
TRAINING = "training"  # its name among what cells measure


def gap(result: CellResult) -> float | None:
    """The score on training rows minus that on validation rows; None where either is missing."""
    trained, validated = result.measured.get(TRAINING), result.validation.get(result.metric)
    return None if trained is None or validated is None else trained - validated


def _printed(summary: Summary) -> Callable[[CellResult], float | None]:
    """The gap with its sign; its size alone in the protocol "faithful", as the paper prints it."""
    if summary.comparison.protocol != "faithful":
        return gap
    return lambda result: None if (found := gap(result)) is None else abs(found)


def _parts(base: Comparison) -> Parts:
    options = {"score_training": ROWS, **base.options}
    return {"": base.model_copy(update={"options": options})}


def _sections(summaries: Summaries) -> list[Section]:
    return [
        Section(
            f"{backbone}: generalisation gap",
            "Extended Data Table 3",
            (
                "Score on training rows minus score on validation rows. The paper prints the "
                "absolute value, which hides negative gaps"
                + (
                    ", and so does this page." if summary.comparison.protocol == "faithful" else "."
                ),
            ),
            (_by_method(summary, backbone), _by_task(summary, backbone)),
        )
        for summary in summaries.values()
        for backbone in summary.comparison.backbones
    ]


def _by_method(summary: Summary, backbone: str) -> Table:
    columns = (
        Column("method"),
        Column("training", "score"),
        Column("validation", "score"),
        Column("gap", "points"),
        Column("from", "points"),
        Column("to", "points"),
    )
    arms = summary.arms(backbone)
    trained = over_tasks(summary, arms, lambda result: result.measured.get(TRAINING))
    validated = over_tasks(summary, arms, lambda result: result.validation.get(result.metric))
    gaps = over_tasks(summary, arms, _printed(summary))
    rows: list[tuple[Value, ...]] = [
        (name, mean(trained[name]), mean(validated[name]), *with_interval(gaps[name]))
        for name in gaps
    ]
    return Table("Over all tasks", columns, tuple(rows), note=INTERVALS, best_of="nothing")


def _by_task(summary: Summary, backbone: str) -> Table:
    arms = summary.arms(backbone)
    rows: list[tuple[Value, ...]] = []
    for task in summary.comparison.tasks:
        found = [list(map(_printed(summary), summary.results(arm, task))) for arm in arms]
        known = [tuple(value for value in gaps if value is not None) for gaps in found]
        rows.append((task, *(Spread(gaps) if gaps else None for gaps in known)))
    heads = (Column("task"), *(Column(str(arm), "points") for arm in arms))
    return Table("Gaps by task", heads, tuple(rows))


def _gaps(summary: Summary, backbone: str) -> dict[str, float]:
    """Method -> its mean gap over the tasks that all have it on."""
    arms = named(summary, backbone)
    found = over_tasks(summary, list(arms.values()), gap)
    return {name: fmean(gaps) for name, arm in arms.items() if (gaps := found[str(arm)])}


def _below_full(summary: Summary, backbone: str) -> Found | None:
    gaps = _gaps(summary, backbone)
    full = gaps.get("full")
    if full is None or len(gaps) < 2:
        return None
    agrees = all(value < full for name, value in gaps.items() if name != "full")
    return Found(f"Gaps: {in_order(gaps)}.", agrees)


def _prompt_least(summary: Summary, backbone: str) -> Found | None:
    gaps = {name: value for name, value in _gaps(summary, backbone).items() if name != "full"}
    if "prompt" not in gaps or len(gaps) < 2:
        return None
    least = min(gaps, key=gaps.__getitem__)
    own = f"prompt {100 * gaps['prompt']:.1f}"
    return Found(f"The smallest is {least} {100 * gaps[least]:.1f}; {own}.", least == "prompt")


def _sums_widen(summary: Summary, backbone: str) -> Found | None:
    alone, arms = _gaps(summary, backbone), summary.arms(backbone)
    found = over_tasks(summary, arms, gap)
    said, agrees = [], []
    for arm in arms:
        members = [method.name for method in parse(arm.method).methods]
        if len(members) > 1 and found[str(arm)] and all(name in alone for name in members):
            whole, largest = fmean(found[str(arm)]), max(alone[name] for name in members)
            said.append(f"{arm} {100 * whole:.1f}, its members up to {100 * largest:.1f}")
            agrees.append(whole > largest)
    return Found(f"{'; '.join(said)}.", sum(agrees) > len(agrees) / 2) if said else None


EXPERIMENT = Experiment(
    name="gap",
    shows="how much better each method does on the rows that it was trained on",
    paper="Extended Data Table 3",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "bitfit", "adapter", "lora", "full"), "seeds": 3},
    claims=(
        Claim(
            "The gap of a single delta is always smaller than that of fine-tuning.",
            everywhere(_below_full),
        ),
        Claim("Prompt tuning tends to have the smallest gap.", everywhere(_prompt_least)),
        Claim("Combining deltas generally enlarges the gap.", everywhere(_sums_widen)),
    ),
)
