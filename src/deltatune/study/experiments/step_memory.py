"""The memory of one training step, beside scores: cells that train side by side have none of their
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from deltatune.study.cell import Arm
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Parts, Summaries
from deltatune.study.section import Place, Scatter
from deltatune.study.select import Grid
from deltatune.study.summary import Summary

__all__ = ["MEMORY", "NOTE", "peaks", "profiled", "scatter", "with_memory"]

MEMORY = "memory"  # the name of the part
ROWS, TOKENS = 32, 128
TEXT = "minimal_pairs"  # whose rows are part of the package; only their number and length count
MIB = 2**20
NOTE = f"Peak memory is that of one training step on {ROWS} rows of {TOKENS} tokens."


def profiled(base: Comparison, rows: int, tokens: int) -> Comparison:
    """The comparison with nothing trained but steps that are measured, on text of its first task.

    Args:
        base: whose arms are measured.
        rows: of the batch; 0 for what is held without a step.
        tokens: of each row.
    """
    few = {"train_rows": 64, "validation_rows": 1, "test_rows": 1}
    options = {**base.options, **few, "profile_rows": rows, "profile_tokens": tokens}
    untrained = {"budget": "nothing", "seeds": 1, "grid": Grid(), "options": options}
    one = {"tasks": base.tasks[:1], "search_tasks": ()}
    return base.model_copy(update={**untrained, **one})


def with_memory(base: Comparison) -> Parts:
    """The comparison, and its arms again for the memory of a step."""
    options = {name: value for name, value in base.options.items() if name != "template"}
    anywhere = base.model_copy(update={"tasks": (TEXT,), "options": options})
    return {"": base, MEMORY: profiled(anywhere, ROWS, TOKENS)}


def peaks(summaries: Summaries, backbone: str) -> dict[Arm, float]:
    """Arm -> the peak memory of a step in MiB, of those that it was measured of."""
    summary = summaries.get(MEMORY)
    arms = [] if summary is None else summary.arms(backbone)
    return {arm: peak for arm in arms if summary and (peak := _peak(summary, arm)) is not None}


def scatter(memory: Mapping[Arm, float], scores: Mapping[str, list[float]]) -> list[Scatter]:
    """Mean scores against memory; nothing where nothing was measured.

    Args:
        memory: see `peaks`.
        scores: see `over_tasks`.
    """
    places = tuple(
        Place(str(arm), mebibytes, 100 * fmean(found))
        for arm, mebibytes in memory.items()
        if (found := scores.get(str(arm)))
    )
    axes = ("Peak memory of a step, MiB", "mean score over the tasks")
    return [Scatter("Score against memory", *axes, places)] if places else []


def _peak(summary: Summary, arm: Arm) -> float | None:
    found = summary.mean(arm, lambda result: result.measured.get("profile peak"))
    return None if found is None else found / MIB
