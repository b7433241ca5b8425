"""Review: methods of every category of Xu et al., what they cost and what they score."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from deltatune.core.grammar import parse
from deltatune.study.cell import Arm
from deltatune.study.experiment import Experiment, Summaries
from deltatune.study.experiments.over_tasks import INTERVALS, over_tasks, with_interval
from deltatune.study.experiments.step_memory import MEMORY, NOTE, peaks, scatter, with_memory
from deltatune.study.section import Column, Place, Scatter, Section, Table, Value
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
        "Xu et al., Tables 2 and 3",
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


EXPERIMENT = Experiment(
    name="review",
    shows="methods of every category of Xu et al.: score, size and memory",
    paper="Xu et al., Tables 2 and 3",
    sections=_sections,
    parts=with_memory,
    defaults={"methods": METHODS, "tasks": TASKS},
)
