"""Review: methods of every category of Xu et al., what they cost and what they score."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import Arm
from deltatune.study.claim import Claim, Found, everywhere
from deltatune.study.experiment import Experiment, Summaries
from deltatune.study.experiments.over_tasks import (
    INTERVALS,
    in_points,
    named,
    only_name,
    over_tasks,
    with_interval,
)
from deltatune.study.experiments.step_memory import MEMORY, NOTE, peaks, scatter, with_memory
from deltatune.study.section import Column, Place, Scatter, Section, Table, Value
from deltatune.study.statistics import interval
from deltatune.study.summary import Summary

__all__ = ["EXPERIMENT"]

TASKS = (
    *("glue_cola", "glue_sst2", "glue_mrpc", "glue_qqp", "glue_mnli", "glue_qnli", "glue_rte"),
    "glue_stsb",
)
METHODS = (
    *("full", "adapter", "pfeiffer", "prompt", "prefix", "ia3"),  # additive
    *("bitfit", "ln_tuning", "diff_pruning"),  # partial
    *("lora", "dora", "adalora", "intrinsic"),  # reparameterised
    *("mam", "unipelt", "compacter"),  # hybrid, unified
)


def _sections(summaries: Summaries) -> list[Section]:
    return [
        _section(summary, peaks(summaries, backbone), backbone)
        for name, summary in summaries.items()
        if name != MEMORY
        for backbone in summary.comparison.backbones
    ]


def _section(summary: Summary, memory: Mapping[Arm, float], backbone: str) -> Section:
    arms = summary.arms(backbone)
    scores = over_tasks(summary, arms)
    columns = (
        Column("category"),
        Column("method"),
        Column("tuned", "percent"),
        Column("peak memory, MiB", "count"),
        Column("score", "score"),
        Column("from", "score"),
        Column("to", "score"),
    )
    rows, places = list[tuple[Value, ...]](), list[Place]()
    for arm in sorted(arms, key=_category):
        name = str(arm)
        tuned = summary.mean(arm, lambda result: result.ratio)
        rows.append((_category(arm), name, tuned, memory.get(arm), *with_interval(scores[name])))
        if tuned and scores[name]:
            places.append(Place(name, 100 * tuned, 100 * fmean(scores[name])))
    axes = ("tuned, % of the backbone", "mean score over the tasks")
    sizes = [Scatter("Score against size", *axes, tuple(places), logarithmic=True)]
    tasks = len(next(iter(scores.values())))
    return Section(
        f"{backbone}: the methods of the review",
        "Tables 2 and 3",
        (f"Means over the {tasks} tasks that every method has a score on.",),
        (
            Table("By category", columns, tuple(rows), note=f"{INTERVALS} {NOTE}"),
            *(sizes if places else []),
            *scatter(memory, scores),
        ),
    )


def _category(arm: Arm) -> str:
    """After Xu et al.; a sum of methods of several is a hybrid."""
    found = {str(method.review_category) for method in parse(arm.method).methods}
    return found.pop() if len(found) == 1 else "hybrid"


def _comparable(summary: Summary, backbone: str) -> Found | None:
    full = named(summary, backbone, "full").get("full")
    if full is None:
        return None
    apart: dict[Arm, list[float]] = {}
    for arm in summary.arms(backbone):
        scores = over_tasks(summary, (arm, full))
        if arm != full and all(scores.values()):
            own, whole = scores[str(arm)], scores[str(full)]
            apart[arm] = [a - b for a, b in zip(own, whole, strict=True)]
    if not apart:
        return None
    level = sum(interval(values)[1] >= 0 for values in apart.values())
    best = max(apart, key=lambda arm: fmean(apart[arm]))
    here = (
        f"{level} of {len(apart)} differ from full tuning by an interval that reaches zero or lies "
        f"above; the best is {best}, {in_points(apart[best])} points."
    )
    return Found(here, level > len(apart) / 2)


def _lighter(summaries: Summaries) -> Mapping[str, Found]:
    found = {}
    for backbone in next(iter(summaries.values())).comparison.backbones:
        memory = peaks(summaries, backbone)
        whole = [peak for arm, peak in memory.items() if only_name(arm) == "full"]
        shares = [
            peak / whole[0] for arm, peak in memory.items() if whole and only_name(arm) != "full"
        ]
        if shares:
            less = sum(share < 1 for share in shares)
            here = (
                f"{less} of {len(shares)} peak below full tuning: {min(shares):.2f} to "
                f"{max(shares):.2f} of its {whole[0]:.0f} MiB."
            )
            found[backbone] = Found(here, less > len(shares) / 2)
    return found


EXPERIMENT = Experiment(
    name="review",
    shows="methods of every category of Xu et al.: score, size and memory",
    paper="Tables 2 and 3",
    source="Xu et al. 2023",
    sections=_sections,
    parts=with_memory,
    defaults={"methods": METHODS, "tasks": TASKS},
    claims=(
        Claim(
            "Most methods score as full fine-tuning does, or better.",
            everywhere(_comparable, but=MEMORY),
        ),
        Claim("They take less memory than full fine-tuning.", _lighter),
    ),
)
