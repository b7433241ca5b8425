"""`deltatune plan`: what a method would do to a model, before anything is done."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from deltatune.cli.options import At, Backbone, Config, Json, Method, Set, gather
from deltatune.cli.output import print_json, show

if TYPE_CHECKING:
    from deltatune.core.plan import Plan

__all__ = ["plan", "plan_data"]


def plan(
    backbone: Backbone = None,
    method: Method = None,
    at: At = None,
    config: Config = None,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Show where a method would sit and what it would train.

    No weights are read; --backbone may also be a config.json.
    """
    given = {"backbone": backbone, "method": method, "at": at}
    values = gather(config, changes, given, needed=("backbone", "method"))

    from deltatune import api
    from deltatune.backbones.load import load_architecture

    model = load_architecture(values["backbone"])
    found = api.plan(model, values["method"], values.get("at"))
    if as_json:
        print_json(plan_data(found))
        return
    from deltatune.cli.tree import draw

    show(draw(model, found, str(values["backbone"])), *summary(found))


def plan_data(found: Plan) -> dict[str, Any]:
    """Returns a plan as plain values."""
    return {
        "method": found.method,
        "trainable": found.trainable,
        "shared": found.shared,
        "stored": found.stored,
        "base": found.base,
        "ratio_base": found.ratio_base,
        "ratio_total": found.ratio_total,
        "sites": [
            {
                "method": site.method,
                "name": site.name,
                "path": site.path,
                "shapes": {leaf: list(shape) for leaf, shape in site.shapes.items()},
                "count": site.count,
            }
            for site in found.sites
        ],
        "memory": {**dataclasses.asdict(found.memory), "total": found.memory.total},
    }


def summary(found: Plan) -> list[str]:
    """Returns the counts of a plan, a line each."""
    mebi = found.memory.total / 2**20
    own = found.trainable - found.shared
    of_tasks = [f"shared    {found.shared:,} that several tasks may share, {own:,} for each task"]
    return [
        "",
        f"{found.method}: {len(found.sites)} sites",
        f"trainable {found.trainable:,} of {found.base:,}: {100 * found.ratio_base:.4g}% of the"
        f" backbone, {100 * found.ratio_total:.4g}% of both",
        *(of_tasks if found.shared else []),
        f"stored    {found.stored:,}",
        f"memory    {mebi:,.1f} MiB for weights, gradients and AdamW, without activations",
    ]
