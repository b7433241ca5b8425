"""Trains longer what stays behind in the study of every delta: is it steps that they lack?

    DELTATUNE_DATA=... python scripts/deltas_longer.py runs/deltas --out runs/deltas-longer

Every method that is further than five points below full tuning, on the tasks on which it is, at the
rate that the study chose for it, with five times the steps and all seeds. It goes on where it
stopped, and several processes share the folder. What is kept was run with `--without diff_pruning
--without adapter_fusion`, whose steps take longest. `scripts/deltas_page.py` writes what came out.
"""

from __future__ import annotations

import argparse
import random

from deltas_page import BACKBONE, POINTS, behind, full_tuning

from deltatune import api
from deltatune.study.comparison import Comparison
from deltatune.study.select import Grid
from deltatune.study.store import open_study
from deltatune.study.summary import summarise
from deltatune.training.budget import Steps, parse

TIMES = 5
TOGETHER = 8


def main() -> int:
    """Runs them, one method after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--out", required=True)
    parser.add_argument("--without", action="append", default=[], metavar="METHOD")
    arguments = parser.parse_args()
    found = summarise(open_study(arguments.study))
    full, budget = full_tuning(found), parse(found.comparison.budget)
    assert isinstance(budget, Steps)
    rates = {group.arm: choice.rate for group, choice in found.choices.items()}
    averages = {arm: found.average(arm, found.comparison.tasks) for arm in found.arms(BACKBONE)}
    whole = averages[full]
    assert whole is not None
    late = behind(averages, whole)
    for arm in random.sample(late, len(late)):  # processes wait for each other at the end alone
        tasks = [
            task
            for task in found.comparison.tasks
            if (own := found.spread(arm, task)) and (best := found.spread(full, task))
            if own.mean < best.mean - POINTS
        ]
        if arm.method in arguments.without or (rate := rates[arm]) is None:
            continue
        same = found.comparison.model_dump(exclude={"grid", "extend"})
        changed = {"backbones": [BACKBONE], "methods": [arm.method], "tasks": tasks}
        longer = Comparison(
            **{**same, **changed, "budget": str(Steps(TIMES * budget.count))},
            grid=Grid(values=(rate,), relative=False),
        )
        print(f"{arm} on {', '.join(tasks)}", flush=True)
        api.compare(longer, arguments.out, together=TOGETHER)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
