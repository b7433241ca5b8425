"""Combination: every subset of some deltas at once, with all rows and with 16 of each label."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse
from deltatune.study.claim import Claim, Found, Look, everywhere
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Experiment, Parts, Summaries
from deltatune.study.experiments.over_tasks import (
    INTERVALS,
    in_points,
    mean,
    over_tasks,
    with_interval,
)
from deltatune.study.section import Column, Section, Table, Value
from deltatune.study.select import Grid
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT", "as_released", "interactions", "subsets"]

SHOTS = 16
ALL, FEW = "all rows", f"{SHOTS} of each label"
EVALUATION = 200  # steps between evaluations in the released code
UNTUNED = "untuned"
TEMPLATE = ", manual template"  # behind the names of the parts that have it
RELEASED = (
    "As in the released code: learning rates chosen on the rows that are reported, and dropout of "
    "the backbone on for an adapter alone, up to the first evaluation for an adapter with others, "
    "off for the rest."
)
Subset = tuple[str, ...]


def subsets(methods: Sequence[str]) -> list[Subset]:
    """All that are not empty, small ones first, each in the order of the methods."""
    counts = range(1, len(methods) + 1)
    return [chosen for n in counts for chosen in itertools.combinations(methods, n)]


def interactions(scores: Mapping[Subset, Sequence[float]]) -> dict[Subset, list[float]]:
    """What a subset has beyond its own subsets, on each task: the Moebius inversion of the scores.

    Of two it is s(ab) - s(a) - s(b) + s(); zero where effects add up. Subsets of which a smaller
    one has no score are left out.
    """
    found = {}
    for whole in scores:
        smaller = [p for n in range(len(whole) + 1) for p in itertools.combinations(whole, n)]
        if len(whole) > 1 and all(part in scores for part in smaller):
            signed = [
                [(-1) ** (len(whole) - len(part)) * score for score in scores[part]]
                for part in smaller
            ]
            found[whole] = [sum(task) for task in zip(*signed, strict=True)]
    return found


def _parts(base: Comparison) -> Parts:
    if len(base.methods) < 2:
        raise ConfigurationError(
            f"A combination is of at least 2 methods; found {', '.join(base.methods)}."
        )
    sums = {str(parse(" + ".join(chosen))): chosen for chosen in subsets(base.methods)}
    every = base.model_copy(update={"methods": tuple(sums)})
    if base.protocol == "faithful":
        every = as_released(every, sums)
    untuned = base.model_copy(
        update={"methods": ("full",), "budget": "nothing", "seeds": 1, "grid": Grid()}
    )
    parts = {ALL: every, FEW: _with(every, shots=SHOTS), UNTUNED: untuned}
    if not str(base.options.get("template")).startswith("manual"):
        return parts
    plain = {name: _with(part, template="no_template") for name, part in parts.items()}
    return plain | {f"{name}{TEMPLATE}": part for name, part in parts.items()}


def _with(part: Comparison, **options: int | str) -> Comparison:
    return part.model_copy(update={"options": {**part.options, **options}})


def as_released(every: Comparison, members: Mapping[str, Subset]) -> Comparison:
    """The comparison with two defects of the code that the authors released, see `docs/study.md`.

    The backbone's dropout was on in all steps of an adapter alone, up to the first evaluation of
    what had an adapter and something else, and never without one; and the learning rate was that
    of the best score on the rows that are reported.

    Args:
        every: whose methods are the keys of `members`.
        members: what each method consists of.
    """
    interval = every.settings.evaluation_every or EVALUATION
    changed: dict[str, dict[str, Any]] = {}
    for method, chosen in members.items():
        if any(one.startswith("adapter") for one in chosen):
            changed[method] = {"base_dropout": True}
            if len(chosen) > 1:
                changed[method]["base_dropout_steps"] = interval
    settings = every.settings.model_copy(update={"evaluation_every": interval})
    return every.model_copy(
        update={"selection": "test", "settings": settings, "by_method": changed}
    )


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _section(summary, summaries.get(_beside(name)), backbone, name)
        for name, summary in summaries.items()
        if not name.startswith(UNTUNED)
        for backbone in summary.comparison.backbones
    ]


def _beside(name: str) -> str:
    """Which part is the untuned one of a part."""
    return f"{UNTUNED}{TEMPLATE if name.endswith(TEMPLATE) else ''}"


def _section(summary: Summary, untuned: Summary | None, backbone: str, name: str) -> Section:
    arms = summary.arms(backbone)
    members = {arm: tuple(str(one) for one in parse(arm.method).methods) for arm in arms}
    base = [] if untuned is None else list(untuned.arms(backbone))
    found = over_tasks(summary, arms)
    scores: dict[Subset, list[float]] = {members[arm]: found[str(arm)] for arm in arms}
    tasks = len(next(iter(scores.values())))
    released = summary.comparison.selection == "test"
    if untuned is not None and len(over := over_tasks(untuned, base)[str(base[0])]) == tasks:
        scores = {(): over, **scores}
    return Section(
        f"{backbone}, {name}",
        "Table 2, Extended Data Table 2",
        (f"Means over {tasks} tasks.", *((RELEASED,) if released else ())),
        (_table(scores), _effects(scores)),
    )


def _table(scores: Mapping[Subset, Sequence[float]]) -> Table:
    names = max(scores, key=len)
    columns = (*(Column(name) for name in names), Column("score", "score"))
    rows: list[tuple[Value, ...]] = [
        (*("yes" if name in chosen else "" for name in names), mean(values))
        for chosen, values in scores.items()
    ]
    return Table("Every subset", columns, tuple(rows))


def _effects(scores: Mapping[Subset, Sequence[float]]) -> Table:
    columns = (
        Column("together"),
        Column("beyond the sum of effects", "points"),
        Column("from", "points"),
        Column("to", "points"),
    )
    rows = tuple(
        (" + ".join(chosen), *with_interval(values))
        for chosen, values in interactions(scores).items()
    )
    return Table("Interaction effects", columns, rows, note=INTERVALS)


def _adding(name: str, agrees: Callable[[float, float], bool]) -> Look:
    """What a method does to what it joins. `agrees` is asked of the mean difference and of the
    share of the combinations that it raises.
    """

    def look(summary: Summary, backbone: str) -> Found | None:
        arms = summary.arms(backbone)
        found = over_tasks(summary, arms)
        scores = {
            frozenset(one.name for one in parse(arm.method).methods): found[str(arm)]
            for arm in arms
        }
        gains = [
            [b - a for a, b in zip(scores[one], scores[one | {name}], strict=True)]
            for one in scores
            if name not in one and one | {name} in scores
        ]
        if not gains or not gains[0]:
            return None
        raised = sum(sum(one) > 0 for one in gains)
        by_task = [fmean(one) for one in zip(*gains, strict=True)]
        here = f"{in_points(by_task)} points; {raised} of {len(gains)} averages rise."
        return Found(here, agrees(fmean(by_task), raised / len(gains)))

    return everywhere(look)


def _templates_help_few(summaries: Summaries) -> Mapping[str, Found]:
    """What a manual template adds to every combination, with few rows and with all."""
    found: dict[str, Found] = {}
    names = [name for part in (FEW, ALL) for name in (part, f"{part}{TEMPLATE}")]
    if not {*names} <= summaries.keys():
        return found
    few, few_manual, every, every_manual = (summaries[name] for name in names)
    for backbone in few.comparison.backbones:
        gains = _gains(few, few_manual, backbone), _gains(every, every_manual, backbone)
        if all(gains):
            small, large = (fmean(one) for one in gains)
            here = f"{100 * small:+.1f} points with {FEW}, {100 * large:+.1f} with {ALL}."
            found[backbone] = Found(here, small > max(0.0, large))
    return found


def _gains(plain: Summary, manual: Summary, backbone: str) -> list[float]:
    """What each arm gains on each task that it has a score on with either template."""
    pairs = [
        (plain.spread(arm, task), manual.spread(arm, task))
        for arm in plain.arms(backbone)
        for task in plain.comparison.tasks
    ]
    return [b.mean - a.mean for a, b in pairs if a is not None and b is not None]


EXPERIMENT = Experiment(
    name="combination",
    shows="every subset of several deltas at once, with all rows and with 16 of each label",
    paper="Table 2, Extended Data Table 2",
    sections=_sections,
    parts=_parts,
    defaults={"methods": ("prompt", "bitfit", "adapter")},
    claims=(
        Claim(
            "An adapter in the combination almost always raises the average.",
            _adding("adapter", lambda mean, share: mean > 0 and share > 0.5),
        ),
        Claim(
            "Prompt tuning in the combination generally harms the average.",
            _adding("prompt", lambda mean, share: mean < 0),
        ),
        Claim(
            "BitFit in the combination generally improves the average.",
            _adding("bitfit", lambda mean, share: mean > 0),
        ),
        Claim(
            "Manual templates help evidently with few rows, and only marginally with all.",
            _templates_help_few,
        ),
    ),
)
