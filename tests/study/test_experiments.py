"""Every experiment from its definition to its sections, without any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.study.fake import TASKS, draw, execute

from deltatune.api import attach, save
from deltatune.cli.study.experiments import EXPERIMENTS as COMMANDS
from deltatune.composition import similarity
from deltatune.core.errors import ConfigurationError, DataError, StateError, UnknownNameError
from deltatune.study.cell import Arm, Cell, CellResult, Point
from deltatune.study.comparison import Comparison
from deltatune.study.experiment import Study, Summaries, run_study, studied, summaries
from deltatune.study.experiments import EXPERIMENTS, find_experiment
from deltatune.study.experiments.combination import interactions, subsets
from deltatune.study.experiments.convergence import area, reached
from deltatune.study.experiments.grid import crossed
from deltatune.study.experiments.performance import PRINTED, paper_averages
from deltatune.study.experiments.step_memory import MEMORY, MIB
from deltatune.study.experiments.transfer import alike, cosines, relative
from deltatune.study.findings import findings
from deltatune.study.section import HeatMap, Listing, Scatter, Section, Table
from deltatune.study.select import Grid
from deltatune.study.store import MemoryStore, Store
from deltatune.study.summary import Spread
from deltatune.tasks.reference import table1
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES

SMALL = {"backbones": ("t5-mini",), "tasks": ("glue_sst2", "glue_rte", "emotion"), "seeds": 2}


def measured(cell: Cell) -> CellResult:
    """The fake's result, with what the options ask for."""
    result = execute(cell)
    found: dict[str, float] = {}
    if cell.options.get("score_training"):
        found["training"] = result.validation[result.metric] + 0.1
    if (rows := cell.options.get("profile_rows")) is not None:
        names = ("static", "activations", "gradients", "optimiser", "counted", "peak")
        times = ("forward", "backward", "update")
        found |= {f"profile {name}": float(1000 * int(rows)) for name in (*names, *times)}
    if cell.options.get("general_text"):
        found |= {"text": 3.0, "text, delta off": 2.5}
    for task in str(cell.options.get("transfer_to") or "").split(" + "):
        if task:
            found[f"on {task}"] = result.score * (1.0 if task == cell.task else 0.5)
    return result.model_copy(update={"measured": found})


def wanted(name: str, **fields: Any) -> Study:
    """A study of an experiment, on little; a file stands for the general text."""
    options = {"options": {"general_text": __file__}} if name == "forgetting" else {}
    plain = {"methods": ("lora", "full")} if name == "grid" else {}
    return find_experiment(name).study(**{**SMALL, **options, **plain, **fields})


def ran(name: str, store: Store | None = None, **fields: Any) -> Summaries:
    store = store or MemoryStore()
    run_study(wanted(name, **fields), measured, store)
    return summaries(store)


def tables(sections: list[Section]) -> dict[str, Table]:
    return {part.title: part for one in sections for part in one.parts if isinstance(part, Table)}


def rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip((c.title for c in table.columns), row, strict=True)) for row in table.rows]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_shows_something(name: str) -> None:
    sections = EXPERIMENTS[name].sections(ran(name))
    assert sections or name == "grid", "whose parts speak for themselves"
    assert all(section.parts for section in sections)
    for table in tables(sections).values():
        assert any(value is not None for row in table.rows for value in row[1:]), table.title


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_report_before_it_is_done(name: str) -> None:
    def fails(cell: Cell) -> CellResult:
        if cell.task == "glue_rte" or draw(cell.id) < 0.5:
            raise ConfigurationError("refused")
        return measured(cell)

    store = MemoryStore()
    run_study(wanted(name), fails, store)
    assert EXPERIMENTS[name].sections(summaries(store)) or name == "grid"


def test_the_commands_say_what_the_experiments_are() -> None:
    said = {name: f"{one.shows} ({one.paper})" for name, one in EXPERIMENTS.items() if one.paper}
    assert said == dict(COMMANDS)
    assert EXPERIMENTS.keys() - said.keys() == {"grid"}, "which `study run` runs"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_report_ends_with_how_it_was_run(name: str) -> None:
    store = MemoryStore()
    summary = next(iter(ran(name, store).values()))
    settings, lines, code, whole = findings(store).sections[-1].parts
    assert isinstance(settings, Table)
    assert isinstance(lines, Table)
    assert isinstance(code, Table)
    assert isinstance(whole, Listing)
    assert Study(**json.loads(whole.text)) == studied(store), "it is run again from its report"
    assert ("optimiser", "adamw") in settings.rows
    assert {row[0] for row in lines.rows} >= {*summary.comparison.tasks}
    assert {cell.code for cell, _ in summary.final} <= {row[1] for row in code.rows}


def test_what_differs_between_parts_is_said_of_each() -> None:
    store = MemoryStore()
    ran("combination", store)
    settings = findings(store).sections[-1].parts[0]
    assert isinstance(settings, Table)
    assert dict(settings.rows)["shots"] == "16 of each label: 16"


def test_a_study_goes_on_and_another_is_refused_its_folder() -> None:
    store = MemoryStore()
    before = ran("gap", store)
    count = len(store.records())
    assert ran("gap", store) == before
    assert len(store.records()) == count
    assert studied(store).experiment == "gap"
    with pytest.raises(StateError, match="holds the study 'gap', not 'scale'"):
        ran("scale", store)
    with pytest.raises(StateError, match="no study"):
        studied(MemoryStore())
    with pytest.raises(UnknownNameError, match="performance"):
        find_experiment("performence")


def test_the_averages_of_the_paper_follow_from_its_rows() -> None:
    """Each printed average is the mean of its printed rows, to the digits that are printed, but
    for the one cell that does not add up.
    """
    wrong = []
    for column in ("pt_large", *PRINTED.values()):
        found = paper_averages(column)
        for row in table1():
            if row["kind"] == "average":
                mean = found["overall" if row["category"] == "All" else row["category"]]
                if abs(mean - float(row[column])) > 0.00501:
                    wrong.append((row["name"], column, round(mean, 3), row[column]))
    assert wrong == [("AVG. OF FACT CHECKING", "ft", 45.325, "45.36")]


def test_convergence_finds_where_a_share_is_reached() -> None:
    curve = tuple(
        Point(step=10 * k, seconds=float(k), validation=score)
        for k, score in enumerate((0.1, 0.5, 0.75, 0.8, 0.79), 1)
    )
    result = CellResult(metric="ACC", scores={"ACC": 0.8}, trainable=1, base=2, curve=curve)
    assert reached(result, 0.9, lambda point: point.step) == 30
    assert reached(result, 0.99, lambda point: point.seconds) == 4.0
    assert area(result) == pytest.approx((0.1 + 0.5 + 0.75 + 0.8 + 0.79) / 5)
    never = result.model_copy(update={"curve": ()})
    assert reached(never, 0.9, lambda point: point.step) is None
    assert area(never) is None


def test_interactions_vanish_where_effects_add_up() -> None:
    effects: Mapping[str, float] = {"a": 0.1, "b": 0.2, "c": 0.05}
    scores = {
        chosen: [0.5 + k * 0.01 + sum(effects[name] for name in chosen) for k in range(3)]
        for chosen in [(), *subsets(tuple(effects))]
    }
    assert len(scores) == 8
    found = interactions(scores)
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")}
    assert all(value == pytest.approx(0, abs=1e-12) for v in found.values() for value in v)
    scores["a", "b"] = [score + 0.03 for score in scores["a", "b"]]
    found = interactions(scores)
    assert found["a", "b"] == pytest.approx([0.03] * 3)
    assert found["a", "b", "c"] == pytest.approx([-0.03] * 3)
    del scores[()]
    assert interactions(scores) == {}


def test_a_combination_is_of_every_subset_with_all_rows_and_with_few() -> None:
    found = ran("combination", methods=("prompt", "bitfit", "adapter"))
    assert {name: len(s.comparison.methods) for name, s in found.items()} == {
        "all rows": 7,
        "16 of each label": 7,
        "untuned": 1,
    }
    assert found["16 of each label"].final[0][0].options["shots"] == 16
    assert found["untuned"].final[0][0].budget == "nothing"
    with pytest.raises(ConfigurationError, match="at least 2 methods"):
        find_experiment("combination").study(**SMALL, methods=("prompt",))


def test_a_combination_with_a_manual_template_is_also_without() -> None:
    found = ran("combination", methods=("prompt", "adapter"), options={"template": "manual:1"})
    parts = ("all rows", "16 of each label", "untuned")
    assert [*found] == [*parts, *(f"{part}, manual template" for part in parts)]
    for name, summary in found.items():
        wanted = "manual:1" if name.endswith("template") else "no_template"
        assert {cell.options["template"] for cell, _ in summary.final} == {wanted}
        assert name.startswith("16") == all("shots" in c.options for c, _ in summary.final)
    sections = EXPERIMENTS["combination"].sections(found)
    assert [section.title.partition(", ")[2] for section in sections] == [
        "all rows",
        "16 of each label",
        "all rows, manual template",
        "16 of each label, manual template",
    ]
    for section in sections:
        (every,) = [part for part in section.parts if part.title == "Every subset"]
        assert isinstance(every, Table)
        assert len(every.rows) == 4, "the untuned backbone, with the same template, among them"


def test_a_sequence_is_every_order_with_a_score_after_each_stage() -> None:
    def staged(cell: Cell) -> CellResult:
        points = tuple(
            Point(step=step, seconds=step / 10, validation=0.5 + step / 1000)
            for step in (100, 200, 300)
        )
        return measured(cell).model_copy(update={"curve": points})

    store = MemoryStore()
    run_study(find_experiment("sequence").study(**SMALL, budget="100 steps"), staged, store)
    (table,) = tables(EXPERIMENTS["sequence"].sections(summaries(store))).values()
    assert len(table.rows) == 6
    first = rows(table)[0]
    assert first["order"] == "prompt > bitfit > adapter"
    assert [first[f"after stage {k}"] for k in (1, 2, 3)] == pytest.approx([0.6, 0.7, 0.8])
    with pytest.raises(ConfigurationError, match="a budget in steps"):
        find_experiment("sequence").study(**SMALL, budget="1 epochs")


def test_the_gap_has_its_sign() -> None:
    found = ran("gap", methods=("lora", "full"))
    table = tables(EXPERIMENTS["gap"].sections(found))["Over all tasks"]
    assert [row["gap"] for row in rows(table)] == pytest.approx([0.1, 0.1])
    assert all(cell.options["score_training"] for cell, _ in found[""].final)


def test_a_faithful_gap_has_none() -> None:
    def unlucky(cell: Cell) -> CellResult:
        result = measured(cell)
        return result.model_copy(
            update={"measured": {"training": result.validation[result.metric] - 0.1}}
        )

    for protocol, wanted in (("clean", -0.1), ("faithful", 0.1)):
        store = MemoryStore()
        study = find_experiment("gap").study(**SMALL, methods=("lora",), protocol=protocol)
        run_study(study, unlucky, store)
        table = tables(EXPERIMENTS["gap"].sections(summaries(store)))["Over all tasks"]
        assert [row["gap"] for row in rows(table)] == pytest.approx([wanted])


def test_a_faithful_combination_has_the_defects_of_the_released_code() -> None:
    clean, faithful = (
        ran("combination", methods=("prompt", "bitfit", "adapter"), protocol=protocol)["all rows"]
        for protocol in ("clean", "faithful")
    )
    assert clean.comparison.selection == "validation" and not clean.comparison.by_method
    assert faithful.comparison.selection == "test"
    found = {
        cell.method: (cell.settings.base_dropout, cell.settings.base_dropout_steps)
        for cell, _ in faithful.final
    }
    assert found == {
        "prompt": (False, None),
        "bitfit": (False, None),
        "adapter": (True, None),
        "prompt + bitfit": (False, None),
        "prompt + adapter": (True, 200),
        "bitfit + adapter": (True, 200),
        "prompt + bitfit + adapter": (True, 200),
    }
    said = [EXPERIMENTS["combination"].sections({"": one})[0].text for one in (clean, faithful)]
    assert "released code" not in str(said[0]) and "released code" in str(said[1])


def test_transfer_is_relative_to_what_was_trained_there() -> None:
    found = ran("transfer", methods=("lora",))
    summary = found[""]
    arm = Arm(backbone="t5-mini", method=summary.comparison.methods[0])
    matrix = relative(summary, arm)
    own = {task: summary.spread(arm, task) for task in SMALL["tasks"]}
    for i, source in enumerate(SMALL["tasks"]):
        assert matrix[i][i] == pytest.approx(1.0)
        here, there = own[source], own["glue_rte"]
        assert here is not None
        assert there is not None
        if source != "glue_rte":
            assert matrix[i][1] == pytest.approx(0.5 * here.mean / there.mean)
    sections = EXPERIMENTS["transfer"].sections(found)
    assert any(isinstance(part, HeatMap) for part in sections[0].parts)
    with pytest.raises(ConfigurationError, match="at least 2 tasks"):
        find_experiment("transfer").study(**{**SMALL, "tasks": ("glue_rte",)})


def test_transfer_shows_how_alike_the_kept_deltas_are(tmp_path: Path) -> None:
    found = ran("transfer", methods=("lora",))
    summary = found[""]
    arm = Arm(backbone="t5-mini", method=summary.comparison.methods[0])
    assert all(value is None for row in cosines(summary, arm) for value in row)
    held = attach(FAMILIES["t5"].build(), "lora(rank=2)", slots=len(SMALL["tasks"]))
    move(held)
    first = dict[tuple[str, int], str]()
    for slot, task in enumerate(SMALL["tasks"]):
        first[task, 0] = str(save(held, tmp_path / task, slot=slot))
    final = tuple(
        (cell, result and result.model_copy(update={"artefact": first.get((cell.task, cell.seed))}))
        for cell, result in summary.final
    )
    kept = replace(summary, final=final)
    matrix = cosines(kept, arm)
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            wanted = similarity((held, i), (held, j))
            assert matrix[i][j] == pytest.approx(wanted, abs=1e-6)
    section = EXPERIMENTS["transfer"].sections({"": kept})[0]
    assert sum(isinstance(part, HeatMap) for part in section.parts) == 2
    assert not any("not where they were kept" in said for said in section.text)
    gone = tmp_path / SMALL["tasks"][0]
    gone.rename(tmp_path / "elsewhere")
    said = EXPERIMENTS["transfer"].sections({"": kept})[0].text
    assert any(f"in no cosine: 1, the first {gone}." in sentence for sentence in said)


def test_tasks_that_do_for_each_other_stand_together() -> None:
    near, far = 0.9, 0.1
    groups = (0, 1, 0, 1)
    matrix = tuple(
        tuple(1.0 if i == j else near if a == b else far for j, b in enumerate(groups))
        for i, a in enumerate(groups)
    )
    order = alike(matrix)
    assert sorted(order) == [0, 1, 2, 3]
    assert [groups[k] for k in order] in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert alike(((1.0, None), (None, 1.0))) == [0, 1]


def test_performance_stands_beside_the_paper() -> None:
    found = ran("performance", methods=("lora", "bitfit", "full"), tasks=tuple(TASKS))
    shown = tables(EXPERIMENTS["performance"].sections(found))
    row = next(row for row in rows(shown["Scores"]) if row["task"] == "glue_sst2")
    assert row["lora: paper"] == pytest.approx(0.9404)
    assert isinstance(row[str(found[""].arms("t5-mini")[0])], Spread)
    assert "bitfit: paper" not in row
    pairs = rows(shown["Two by two"])
    assert [(row["first"].partition("(")[0], row["second"].partition("(")[0]) for row in pairs] == [
        ("lora", "bitfit"),
        ("lora", "full"),
        ("bitfit", "full"),
    ]


@pytest.mark.parametrize("name", ["transfer", "forgetting"])
def test_a_delta_is_not_tested_on_a_task_that_is_unavailable(name: str) -> None:
    def describe(backbone: str, task: str, protocol: str) -> dict[str, Any]:
        if task == "glue_rte":
            raise DataError("glue_rte: set DELTATUNE_DATA.")
        return {}

    store = MemoryStore()
    run_study(wanted(name), measured, store, describe=describe)
    for found in summaries(store).values():
        targets = {str(cell.options["transfer_to"]) for cell, _ in found.final}
        assert targets == {"glue_sst2 + emotion"} and found.unavailable.keys() == {"glue_rte"}


def test_an_unavailable_task_stands_beside_the_paper_without_a_score() -> None:
    def describe(backbone: str, task: str, protocol: str) -> dict[str, Any]:
        if task == "emotion":
            raise DataError("emotion: no such folder.")
        return {}

    store = MemoryStore()
    run_study(wanted("performance", methods=("lora", "full")), measured, store, describe=describe)
    table = tables(EXPERIMENTS["performance"].sections(summaries(store)))["Scores"]
    names = [row["task"] for row in rows(table)]
    assert names == ["glue_sst2", "glue_rte", "emotion (unavailable)", "Average of 2"]
    assert [row["full: paper"] is not None for row in rows(table)] == [True] * 4
    assert rows(table)[2]["full"] is None and rows(table)[3]["full"] is not None
    assert table.averages == {3}
    assert dict(findings(store).facts)["Unavailable"] == "emotion"


def test_what_was_not_measured_is_named_at_the_end() -> None:
    def fails(cell: Cell) -> CellResult:
        if cell.options["profile_tokens"] == 512:
            raise ConfigurationError("512 positions are too many.")
        return measured(cell)

    store = MemoryStore()
    run_study(wanted("efficiency", methods=("lora", "full")), fails, store)
    found = findings(store)
    assert [one.title for one in found.sections[-2:-1]] == ["What is missing"]
    first, second = found.sections[-2].text
    assert first.startswith("length 512: Failed: t5-mini, lora, glue_sst2")
    assert "512 positions are too many." in second
    assert dict(found.facts)["Cells"] == "18 of 20 done, 2 failed"


@pytest.mark.parametrize("name", ["performance", "review"])
def test_the_memory_of_a_step_stands_beside_the_scores(name: str) -> None:
    """Also where cells are trained side by side, which have no memory of their own."""
    fields: dict[str, Any] = {"methods": ("lora", "full"), "search_tasks": ("glue_rte",)}
    options = {"shots": 16, "template": "manual"}
    found = ran(name, grid=Grid(values=(1.0, 3.0)), options=options, **fields)
    cells = [cell for cell, _ in found[MEMORY].final]
    assert [cell.task for cell in cells] == ["minimal_pairs"] * 2, "which is always at hand"
    assert {(cell.budget, cell.seed, cell.options["shots"]) for cell in cells} == {
        ("nothing", 0, 16)
    }
    assert not any("template" in cell.options for cell in cells), "that task has none"
    parts = [part for one in EXPERIMENTS[name].sections(found) for part in one.parts]
    (figure,) = [part for part in parts if getattr(part, "title", "") == "Score against memory"]
    assert isinstance(figure, Scatter)
    assert [place.x for place in figure.places] == pytest.approx([32_000 / MIB] * 2)
    assert all(place.y > 1 for place in figure.places), "scores times 100"


def test_a_grid_crosses_protocols_and_budgets_and_shows_what_protocols_do() -> None:
    base = Comparison(**SMALL, methods=("lora", "full"))
    study = crossed(base, ["clean", "faithful"], ["1 epoch", "50 steps"])
    assert [(p.protocol, p.budget) for p in study.parts.values()] == [
        ("clean", "1 epochs"),
        ("clean", "50 steps"),
        ("faithful", "1 epochs"),
        ("faithful", "50 steps"),
    ]

    def easier(cell: Cell) -> CellResult:
        result = measured(cell)
        more = 0.05 if cell.protocol == "faithful" else 0.0
        same = execute(Cell(**{**cell.model_dump(), "protocol": "clean"}))
        return result.model_copy(update={"scores": {result.metric: same.score + more}})

    store = MemoryStore()
    run_study(study, easier, store)
    found = tables(EXPERIMENTS["grid"].sections(summaries(store)))["Means over tasks"]
    assert [row["difference"] for row in rows(found)] == pytest.approx([-0.05, -0.05])
    assert len(EXPERIMENTS["grid"].sections(summaries(store))) == 2
    with pytest.raises(ConfigurationError, match="stands twice"):
        crossed(base, ["clean", "clean"], [])


def test_a_report_says_once_what_holds_for_all_parts_and_nothing_of_untrained_ones() -> None:
    store = MemoryStore()
    run_study(wanted("combination", methods=("prompt", "bitfit")), measured, store)
    found = findings(store)
    facts = dict(found.facts)
    assert facts["Rows"] == "protocol clean"
    assert facts["Seeds"] == "all rows: 2; 16 of each label: 2; untuned: 1"
    titles = [section.title for section in found.sections]
    assert any(title.startswith("all rows: Scores") for title in titles)
    assert not any(title.startswith("untuned") for title in titles)
    assert found.failures == 0
