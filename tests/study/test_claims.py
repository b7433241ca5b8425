"""What the paper says beside what is found: each claim agrees where it holds, and only there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.study.test_experiments import measured, tables, wanted

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import parse
from deltatune.study.cell import Cell, CellResult, Point
from deltatune.study.claim import Found
from deltatune.study.experiment import run_study, summaries
from deltatune.study.experiments import EXPERIMENTS
from deltatune.study.findings import findings
from deltatune.study.store import MemoryStore

Change = Callable[[Cell, CellResult], dict[str, Any]]
ALL = ("full", "lora", "adapter", "prefix", "prompt")
SUMS = ("prompt", "bitfit", "adapter")
GAPS = ("full", "lora", "prompt", "prompt + lora")


def held(name: str, change: Change, **fields: Any) -> dict[str, Mapping[str, Found]]:
    """The paper's words -> what is found, in a study whose results are changed."""

    def execute(cell: Cell) -> CellResult:
        result = measured(cell)
        return result.model_copy(update=change(cell, result))

    store = MemoryStore()
    run_study(wanted(name, **fields), execute, store)
    return {claim.says: claim.look(summaries(store)) for claim in EXPERIMENTS[name].claims}


def names(cell: Cell) -> list[str]:
    return [method.name for method in parse(cell.method).methods]


def scored(**by_name: float) -> Change:
    """The score of a cell is the sum of what its methods have."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        score = sum(by_name.get(name, 0.0) for name in names(cell))
        return {"scores": {result.metric: score}}

    return change


def sized(cell: Cell, result: CellResult) -> dict[str, Any]:
    shares = {"full": 100, "lora": 3, "adapter": 5, "prefix": 8, "prompt": 1}
    return {"trainable": shares[names(cell)[0]], "base": 100}


def both(*changes: Change) -> Change:
    return lambda cell, result: {k: v for one in changes for k, v in one(cell, result).items()}


def curved(**soon: float) -> Change:
    """A curve that is at a share of its end halfway."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        heights = (0.8 * soon[names(cell)[0]], 0.8)
        points = [
            Point(step=n, seconds=n, loss=1.0, validation=h)
            for n, h in zip((150, 300), heights, strict=True)
        ]
        return {"curve": tuple(points)}

    return change


def spread(**gaps: float) -> Change:
    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        own = sum(gaps[name] for name in names(cell))
        return {"measured": {"training": result.validation[result.metric] + own}}

    return change


def staged(later: float, best: Mapping[str, str]) -> Change:
    """Validation scores of 0.5 in the first stage, and so much more in each later one."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        curve = tuple(
            Point(step=200 * n, seconds=n, loss=1.0, validation=0.5 + later * (n - 1))
            for n in (1, 2, 3)
        )
        score = 0.9 if cell.method.startswith(best[cell.task]) else 0.5
        return {"curve": curve, "scores": {result.metric: score}}

    return change


def grown(score: float, steps: int) -> Change:
    """Much larger backbones differ by so much, and need so many steps more."""
    order = ("t5-nano", "t5-micro", "t5-mini")

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        place = order.index(cell.backbone)
        half = 100 + steps * place
        curve = [Point(step=n, seconds=n, loss=1.0, validation=0.5) for n in (half, 300)]
        extra = 0.1 * score * (names(cell) == ["selective_module"])
        return {
            "base": 10 ** (6 + place),
            "scores": {result.metric: 0.5 + score * place + extra},
            "curve": tuple(curve),
        }

    return change


def carried(near: float, far: float) -> Change:
    categories = {"glue_sst2": "a", "emotion": "a", "glue_rte": "b"}

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        shares = {
            f"on {task}": 0.5 * (near if category == categories[cell.task] else far)
            for task, category in categories.items()
        }
        return {
            "measured": shares,
            "category": categories[cell.task],
            "scores": {result.metric: 0.5},
        }

    return change


def kinds(between: float, within: float) -> Change:
    """Scores of two kinds of delta, at a small and at a large size."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        score = 0.4 + between * ("adapter" in cell.method) + within * ("16" in cell.method)
        curve = [Point(step=n, seconds=n, loss=1.0, validation=score) for n in (1, 2)]
        return {"scores": {result.metric: score}, "curve": tuple(curve)}

    return change


def forgot(full: float, delta: float) -> Change:
    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        rise = 0.0 if cell.budget == "nothing" else full if cell.method == "full" else delta
        return {"measured": {"text": 3.0 + rise}}

    return change


def manual(more: float) -> Change:
    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        return {"scores": {result.metric: 0.4 + more * (cell.options.get("template") == "manual")}}

    return change


def templated(change: Change, few: float, every: float) -> Change:
    """So much more with a manual template, with few rows and with all."""

    def changed(cell: Cell, result: CellResult) -> dict[str, Any]:
        more = few if cell.options.get("shots") else every
        score = change(cell, result)["scores"][result.metric]
        manual = cell.options["template"] == "manual"
        return {"scores": {result.metric: score + more * manual}}

    return changed


def profiled(**of: tuple[float, float, float]) -> Change:
    """Bytes that a row takes beside 10 for the backbone, and times of both passes."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        held, forward, backward = of[names(cell)[0]]
        rows = float(cell.options.get("profile_rows") or 0)
        static = 90.0 if cell.method == "full" else 10.0
        keys = ("static", "activations", "gradients", "optimiser", "peak", "update")
        found = {f"profile {key}": 1.0 for key in keys}
        found |= {"profile counted": static + rows * held}
        found |= {"profile forward": forward, "profile backward": backward}
        return {"measured": found}

    return change


def held_by(full: float, delta: float) -> Change:
    """Bytes at the peak of a step."""

    def change(cell: Cell, result: CellResult) -> dict[str, Any]:
        return {"measured": {"profile peak": full if cell.method == "full" else delta}}

    return change


RIGHT = {"full": 0.8, "lora": 0.79, "adapter": 0.785, "prefix": 0.78, "prompt": 0.5}
WRONG = {"full": 0.7, "lora": 0.6, "adapter": 0.62, "prefix": 0.85, "prompt": 0.61}
SIZES = {
    "methods": ("lora(rank=1)", "lora(rank=16)", "adapter(bottleneck=2)", "adapter(bottleneck=16)")
}
ORDERS = {"glue_sst2": "prompt >> ", "glue_rte": "bitfit >> prompt", "emotion": "adapter >> b"}
SAME = dict.fromkeys(ORDERS, "prompt >> b")

CASES: list[tuple[str, Change, Change, dict[str, Any]]] = [
    ("performance", both(scored(**RIGHT), sized), both(scored(**WRONG), sized), {"methods": ALL}),
    (
        "convergence",
        curved(full=0.9, adapter=0.8, lora=0.8, prefix=0.5, prompt=0.1),
        curved(full=0.5, adapter=0.8, lora=0.8, prefix=0.9, prompt=0.1),
        {"methods": ALL},
    ),
    (
        "combination",
        templated(scored(prompt=-0.1, bitfit=0.1, adapter=0.3), few=0.2, every=0.01),
        templated(scored(prompt=0.1, bitfit=-0.1, adapter=-0.3), few=0.1, every=0.2),
        {"methods": SUMS, "options": {"template": "manual"}},
    ),
    ("sequence", staged(0.1, ORDERS), staged(-0.1, SAME), {"methods": SUMS}),
    (
        "gap",
        spread(full=0.3, lora=0.1, prompt=0.05),
        spread(full=-0.5, lora=-0.2, prompt=-0.1),
        {"methods": GAPS},
    ),
    ("scale", grown(0.1, -20), grown(-0.1, 20), {"backbones": ("t5-mini", "t5-nano", "t5-micro")}),
    ("transfer", carried(0.9, 0.2), carried(0.2, 0.9), {"methods": ("lora",)}),
    ("size", kinds(0.3, 0.1), kinds(0.1, 0.3), SIZES),
    ("forgetting", forgot(2.0, 0.1), forgot(0.1, 2.0), {"methods": ("lora", "full")}),
    ("zero-shot", manual(0.2), manual(-0.2), {}),
    (
        "efficiency",
        profiled(full=(20, 2, 5), bitfit=(9, 2, 3), adapter=(12, 3, 4)),
        profiled(full=(2, 3, 2), bitfit=(12, 4, 3), adapter=(9, 2, 4)),
        {"methods": ("full", "bitfit", "adapter")},
    ),
    (
        "review",
        both(scored(full=0.5, lora=0.5, adapter=0.6, prompt=0.4), held_by(9.0, 5.0)),
        both(scored(full=0.5, lora=0.5, adapter=0.4, prompt=0.4), held_by(5.0, 9.0)),
        {"methods": ("full", "lora", "adapter", "prompt")},
    ),
]


def test_every_experiment_with_claims_is_a_case() -> None:
    assert {name for name, one in EXPERIMENTS.items() if one.claims} == {case[0] for case in CASES}


@pytest.mark.parametrize(("name", "right", "wrong", "fields"), CASES, ids=lambda one: str(one)[:12])
def test_a_claim_agrees_where_it_holds_and_only_there(
    name: str, right: Change, wrong: Change, fields: dict[str, Any]
) -> None:
    for change, agrees in ((right, True), (wrong, False)):
        for says, places in held(name, change, **fields).items():
            assert places, says
            assert {found.agrees for found in places.values()} == {agrees}, (says, places)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_cannot_be_said_is_left_out(name: str) -> None:
    """Of arms that the paper does not have, or without any result."""
    fields = {"methods": ("ia3", "vera")} if name not in ("zero-shot", "forgetting") else {}

    def fails(cell: Cell) -> CellResult:
        raise ConfigurationError("refused")

    for execute in (measured, fails):
        store = MemoryStore()
        run_study(wanted(name, **fields), execute, store)
        found = summaries(store)
        for claim in EXPERIMENTS[name].claims:
            assert execute is measured or claim.look(found) == {}, claim.says


def test_templates_are_compared_on_the_tasks_that_have_both() -> None:
    gains = templated(scored(prompt=0.1, adapter=0.2), few=0.2, every=0.1)

    def execute(cell: Cell) -> CellResult:
        if cell.task == "glue_rte" and cell.options["template"] == "no_template":
            raise ConfigurationError("It has none of that style.")
        result = measured(cell)
        return result.model_copy(update=gains(cell, result))

    store = MemoryStore()
    fields = {"methods": SUMS[::2], "options": {"template": "manual"}}
    run_study(wanted("combination", **fields), execute, store)
    found = EXPERIMENTS["combination"].claims[-1].look(summaries(store))["t5-mini"]
    assert found == Found("+20.0 points with 16 of each label, +10.0 with all rows.", True)


def test_claims_come_first_in_a_report() -> None:
    store = MemoryStore()
    run_study(wanted("performance", methods=ALL), measured, store)
    first = findings(store).sections[0]
    (table,) = tables([first]).values()
    assert first.title == "What the paper finds, and what is found here"
    assert [row[0] for row in table.rows] == [one.says for one in EXPERIMENTS["performance"].claims]
    assert {row[1] for row in table.rows} == {"t5-mini"}
    assert {row[3] for row in table.rows} <= {"yes", "no"}
