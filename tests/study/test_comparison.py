"""A comparison from its definition to its tables and its page, without any model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console
from tests.study.fake import TASKS, execute
from tests.study.html import Page

from deltatune.core.errors import (
    ConfigurationError,
    DataError,
    StateError,
    TrainingError,
    UnknownNameError,
)
from deltatune.study.cell import Cell, CellResult
from deltatune.study.comparison import Comparison, preset, run_comparison
from deltatune.study.page import render_page, sections, write_page
from deltatune.study.runner import Event
from deltatune.study.section import Bars, HeatMap, Lines, Scatter, Table, number_of
from deltatune.study.select import Grid
from deltatune.study.store import MemoryStore, Store
from deltatune.study.summary import Row, Spread, Summary, summarise
from deltatune.study.table import as_data, as_markdown, as_tables, best_places, percent, remarks

GRID = Grid(values=(3e-4, 1e-3, 3e-3), relative=False)


def compare(store: Store, execute: Any = execute, **fields: Any) -> Summary:
    spec = {
        "backbones": ("t5-mini",),
        "tasks": tuple(TASKS),
        "methods": ("full", "lora(rank=4)", "bitfit"),
        "seeds": 2,
        "grid": GRID,
        **fields,
    }
    run_comparison(Comparison(**spec), execute, store)
    return summarise(store)


def on_terminal(summary: Summary, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*as_tables(summary))
    return console.export_text()


@pytest.fixture(scope="module")
def summary() -> Summary:
    return compare(MemoryStore())


def test_a_task_that_cannot_be_had_is_said_to_be_unavailable(tmp_path: Path) -> None:
    missing = {"samsum"}

    def describe(backbone: str, task: str, protocol: str) -> dict[str, Any]:
        if task in missing:
            raise DataError(f"{task}: set DELTATUNE_DATA.")
        return {}

    store = MemoryStore()
    comparison = Comparison(
        backbones=("t5-mini",), tasks=tuple(TASKS), methods=("lora", "full"), grid=GRID
    )
    run_comparison(comparison, execute, store, describe=describe)
    found = summarise(store)
    assert found.unavailable == {"samsum": "samsum: set DELTATUNE_DATA."}
    assert len(found.final) == 2 * 4 and not found.failures
    row, average = found.rows("t5-mini")[-2:]
    assert (row.name, row.remark, row.entries) == ("samsum", "unavailable", (None, None))
    assert average.name == "Average of 4 of 5 tasks" and None not in average.entries
    said = "samsum: unavailable. samsum: set DELTATUNE_DATA."
    assert said in remarks(found) and as_data(found)["unavailable"] == found.unavailable
    page = render_page(found)
    assert said in page and "samsum (unavailable)" in page
    missing.clear()
    run_comparison(comparison, execute, store, describe=describe)
    whole = summarise(store)
    assert not whole.unavailable and len(whole.final) == 2 * 5
    assert whole.rows("t5-mini")[-1].name == "Average of all tasks"


def test_nothing_is_compared_on_tasks_of_which_none_can_be_had() -> None:
    def describe(backbone: str, task: str, protocol: str) -> dict[str, Any]:
        if task != "emotion":
            raise DataError(f"{task} is not there.")
        return {}

    def on(*tasks: str, **fields: Any) -> None:
        comparison = Comparison(backbones=("t5-mini",), tasks=tasks, methods=("lora",), **fields)
        run_comparison(comparison, execute, MemoryStore(), describe=describe)

    with pytest.raises(DataError, match=r"no task can be had. glue_sst2 is not there. glue_rte is"):
        on("glue_sst2", "glue_rte")
    with pytest.raises(DataError, match="no task to search learning rates on can be had"):
        on("glue_sst2", "emotion", search_tasks=("glue_sst2",))


def test_every_arm_is_searched_equally_and_seeds_follow(summary: Summary) -> None:
    assert len(summary.searched) == 3 * 3 * len(TASKS)
    assert len(summary.final) == 3 * 2 * len(TASKS)
    assert {cell.learning_rate for cell, _ in summary.final} == {1e-3}
    assert {cell.seed for cell, _ in summary.searched} == {0}
    assert all(not choice.at_edge for choice in summary.choices.values())


def test_rates_are_searched_on_some_of_the_tasks() -> None:
    found = compare(MemoryStore(), search_tasks=("emotion",))
    assert {cell.task for cell, _ in found.searched} == {"emotion"}
    assert len(found.searched) == 3 * 3 and len(found.final) == 3 * 2 * len(TASKS)
    assert {cell.learning_rate for cell, _ in found.final} == {1e-3}
    assert "Learning rates were chosen on emotion." in as_data(found)["remarks"]
    assert "the best on validation of emotion" in render_page(found)
    with pytest.raises(UnknownNameError, match=r"emotoin.*emotion"):
        Comparison(
            backbones=("a",), tasks=("emotion",), methods=("lora",), search_tasks=("emotoin",)
        )
    with pytest.raises(ConfigurationError, match="Leave search_tasks out"):
        Comparison(
            backbones=("a",),
            tasks=("emotion",),
            methods=("lora",),
            search_tasks=("emotion",),
            per="task",
        )


def test_nothing_is_run_twice() -> None:
    store, calls = MemoryStore(), []

    def counted(cell: Cell) -> CellResult:
        calls.append(cell.id)
        return execute(cell)

    first = compare(store, counted)
    assert compare(store, counted) == first
    assert len(calls) == len(set(calls)) == 3 * (3 + 1) * len(TASKS)
    size = len(store.records())
    compare(store, counted, tasks=("emotion",))
    assert len(calls) == len(set(calls)) == 3 * (3 + 1) * len(TASKS)
    assert len(store.records()) == size + 2, "only the note of what is compared is new"


def test_a_process_that_joins_late_does_not_undo_what_is_known() -> None:
    store = MemoryStore()
    whole = compare(store, tasks=("emotion",))

    def look(event: Event) -> None:
        assert summarise(store) == whole

    comparison = whole.comparison
    run_comparison(comparison, execute, store, watch=look)
    assert summarise(store) == whole


def test_a_report_of_an_unfinished_comparison_says_so() -> None:
    store, ran = MemoryStore(), 0

    def stopped(cell: Cell) -> CellResult:
        nonlocal ran
        ran += 1
        if ran > 4:
            raise KeyboardInterrupt
        return execute(cell)

    with pytest.raises(KeyboardInterrupt):
        compare(store, stopped)
    said = as_markdown(summarise(store))
    assert f"Not complete: {3 * 3 * len(TASKS) - 4} cells are still to be run." in said
    assert "still to be run" not in as_markdown(compare(store))


def test_grids_grow_until_their_best_value_is_inside() -> None:
    low = Grid(values=(1e-5, 3e-5, 9e-5), relative=False)
    stuck = compare(MemoryStore(), methods=("lora",), grid=low, extend=1)
    assert [c.at_edge for c in stuck.choices.values()] == [True]
    assert "is at the edge of its grid" in as_markdown(stuck)
    free = compare(MemoryStore(), methods=("lora",), grid=low, extend=9)
    (choice,) = free.choices.values()
    assert not choice.at_edge and 3e-4 < (choice.rate or 0) < 3e-3


def test_a_rate_can_be_chosen_for_each_task() -> None:
    store = MemoryStore()
    per_task = compare(store, per="task", methods=("lora",))
    assert [group.tasks for group in per_task.choices] == [(task,) for task in TASKS]


def test_one_value_needs_no_search() -> None:
    alone = compare(MemoryStore(), grid=Grid())
    assert not alone.searched and not alone.choices
    assert {c.learning_rate for c, _ in alone.final if c.method == "full"} == {preset("full")}


def test_failed_cells_are_shown_and_do_not_stop_the_rest() -> None:
    def fragile(cell: Cell) -> CellResult:
        if cell.method == "bitfit" and cell.task == "emotion":
            raise TrainingError("The loss is not finite at step 7.")
        return execute(cell)

    summary = compare(MemoryStore(), fragile)
    row = next(row for row in summary.rows("t5-mini") if row.name == "emotion")
    assert [entry is None for entry in row.entries] == [False, False, True]
    overall = summary.rows("t5-mini")[-1]
    assert overall.entries[2] is None, "no average over an incomplete column"
    text = as_markdown(summary)
    assert "bitfit, emotion, seed 0" in text and "not finite at step 7" in text
    assert "no learning rate ran to its end" in text
    assert "not finite at step 7" in render_page(summary)


def test_a_failed_cell_is_tried_again_once_on_request() -> None:
    store, calls = MemoryStore(), list[Cell]()

    def fragile(cell: Cell) -> CellResult:
        calls.append(cell)
        if cell.method == "bitfit":
            raise TrainingError("The loss is not finite at step 7.")
        return execute(cell)

    first = compare(store, fragile, tasks=("emotion",))
    failures, ran = len(first.failures), len(calls)
    assert compare(store, fragile, tasks=("emotion",)) == first and len(calls) == ran
    run_comparison(first.comparison, fragile, store, retry=True)
    assert failures == len(calls) - ran == 3 + 1, "three rates, and a second seed"


def test_averages_are_means_of_rows_and_their_spread_is_over_seeds(summary: Summary) -> None:
    rows = {row.name: row for row in summary.rows("t5-mini")}
    assert list(rows)[:4] == ["glue_sst2", "emotion", "tweet_eval_hate", "Average of emotion"]
    mean = rows["Average of emotion"].entries[0]
    parts = [rows[name].entries[0] for name in ("emotion", "tweet_eval_hate")]
    assert mean is not None and len(mean.values) == 2
    assert mean.mean == pytest.approx(sum(p.mean for p in parts if p is not None) / 2)
    assert rows["Average of all tasks"].kind == "overall"
    assert rows["tweet_eval_hate"].remark == "proxy"
    assert rows["samsum"].remark == "partial, 80 test rows: noisy"


def test_the_markdown_table_has_the_form_of_table_1(summary: Summary) -> None:
    lines = as_markdown(summary).splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    assert cells[0] == ["t5-mini", "Metric", "Commonest label", "full", "lora(rank=4)", "bitfit"]
    assert cells[2] == ["Ratio of tunable parameters", "", "", "100%", "0.38%", "0.1%"]
    assert len({len(line) for line in cells}) == 1
    assert re.fullmatch(r"\d\d\.\d\d ±\d\.\d\d", cells[3][3])
    assert percent(0.0003097) == "0.031%" and percent(1.0) == "100%" and percent(None) == "-"


def test_the_terminal_shows_the_same_numbers(summary: Summary) -> None:
    printed = on_terminal(summary, 160)
    for number in re.findall(r"\d\d\.\d\d ±\d\.\d\d", as_markdown(summary)):
        assert number in printed


def test_many_arms_stand_below_each_other() -> None:
    methods = tuple(f"lora(rank={rank})" for rank in range(9, 39))
    one_rate = Grid(values=(1e-3,), relative=False)
    found = compare(MemoryStore(), methods=methods, tasks=("emotion",), grid=one_rate, seeds=1)
    lines = as_markdown(found).splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    assert cells[0][:3] == ["t5-mini", "Ratio of tunable parameters", "emotion"]
    assert [line[0] for line in cells[2:]] == ["Metric", "Commonest label", *methods]
    printed = on_terminal(found, 100)
    assert all(
        method in printed and line[2] in printed
        for method, line in zip(methods, cells[4:], strict=True)
    )


def test_machines_get_fractions_for_every_seed(summary: Summary) -> None:
    data = json.loads(json.dumps(as_data(summary)))
    table = data["tables"]["t5-mini"]
    assert table["ratio"]["full"] == 1.0
    assert [len(v) for v in table["rows"][0]["scores"].values()] == [2, 2, 2]
    assert {row["chosen"] for row in data["learning_rates"]} == {1e-3}


def test_arms_that_do_not_beat_the_commonest_label_are_named() -> None:
    def hopeless(cell: Cell) -> CellResult:
        result = execute(cell)
        scores = {result.metric: 0.1} if cell.method == "bitfit" else result.scores
        return result.model_copy(update={"scores": scores})

    summary = compare(MemoryStore(), hopeless, tasks=("glue_rte",))
    said = "bitfit on glue_rte (10.00) does not beat the commonest label (53.00)."
    assert said in as_markdown(summary) and said in Page(render_page(summary)).texts
    assert "1 score not above the commonest label" in render_page(summary)


def test_the_page_is_self_contained_and_well_formed(summary: Summary) -> None:
    page = Page(render_page(summary))
    assert not page.open
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    # A heat map, two axes a task, three measures and four costs, the rates.
    assert page.tags.count("svg") == 1 + 2 * len(TASKS) + 3 + 4 + 1
    text = " ".join(page.texts)
    assert "Convergence on t5-mini" in text and "0.38%" in text and "proxy" in text
    assert "nan" not in text and "None" not in text


def test_the_page_shows_what_the_table_does(summary: Summary) -> None:
    cells = [text for text, _ in Page(render_page(summary)).cells]
    for line in as_markdown(summary).splitlines():
        if line.startswith("|") and "---" not in line:
            found = [cell.strip() for cell in line.strip("|").split("|")][3:]
            assert all(cell in cells for cell in found), line


def test_what_a_page_says_in_which_order(summary: Summary) -> None:
    found = sections(summary)
    assert [section.title for section in found] == [
        "Scores on t5-mini",
        "Convergence on t5-mini",
        "Cost on t5-mini",
        "Learning rates on t5-mini",
        "To be read with the numbers",
    ]
    scores, curves, costs, rates, said = found
    table = scores.parts[0]
    assert isinstance(table, Table)
    kinds = [row.kind for row in summary.rows("t5-mini")]
    assert table.averages == {0, *(n for n, kind in enumerate(kinds, 1) if kind != "task")}
    categories = ["Classification/sentiment analysis", "Classification/emotion"]
    assert [row[1] for row in table.rows][1:3] == categories
    (first, *_), (tried, lines) = curves.parts, rates.parts
    assert isinstance(first, Lines) and len(first.series[0].band) == 10, "two seeds"
    assert isinstance(tried, Table) and {row[3] for row in tried.rows} == {1e-3}
    assert isinstance(lines, Lines) and [s.ringed for s in lines.series] == [frozenset([1])] * 3
    clouds = [part for part in costs.parts if isinstance(part, Scatter)]
    assert [cloud.x for cloud in clouds] == [
        "Training time, s",
        "Peak memory, MiB",
        "Tuned parameters",
    ]
    overall = summary.rows("t5-mini")[-1].entries[1]
    assert overall is not None
    assert {(p.name, p.y) for p in clouds[2].places} >= {("lora(rank=4)", 100 * overall.mean)}
    assert said.text == tuple(remarks(summary))


def test_many_tasks_share_their_curves(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    def curves() -> list[Lines]:
        (found,) = [one for one in sections(summary) if one.title.startswith("Convergence")]
        return [part for part in found.parts if isinstance(part, Lines)]

    each = curves()
    assert len(each) == 2 * len(TASKS) and each[0].series[0].band
    monkeypatch.setattr("deltatune.study.page._MOST_CURVES", 1)
    steps, seconds = curves()
    assert steps.title == f"Mean over {len(TASKS)} tasks, by steps" and "seconds" in seconds.title
    for k, series in enumerate(steps.series):
        alone = [figure.series[k].points for figure in each[::2]]
        wanted = [fmean(point[1] for point in points) for points in zip(*alone, strict=True)]
        assert [y for _, y in series.points] == pytest.approx(wanted) and not series.band


def test_many_arms_stand_below_each_other_and_figures_show_the_best() -> None:
    methods = tuple(f"lora(rank={rank})" for rank in range(1, 15))
    summary = compare(MemoryStore(), tasks=("emotion", "glue_rte"), methods=methods)
    arms, tasks = summary.arms("t5-mini"), summary.comparison.tasks
    means = {str(arm): number_of(summary.average(arm, tasks)) or 0.0 for arm in arms}
    wanted = set(sorted(means, key=lambda name: means[name])[2:])
    found = {one.title.partition(" on ")[0]: one for one in sections(summary)}
    scores, distances = found["Scores"].parts
    assert isinstance(scores, Table) and isinstance(distances, HeatMap)
    assert [row[0] for row in scores.rows] == [*means, "Commonest label"]
    assert [column.title for column in scores.columns] == [
        *("Arm", "emotion, Classification-F1", "glue_rte, ACC", "Average of all tasks"),
        "Ratio of tunable parameters",
    ]
    assert scores.rows[-1][1:3] == (0.35, 0.53) and scores.averages == {len(methods)}
    assert distances.rows == tuple(means)
    assert distances.columns == ("emotion", "glue_rte")
    said = "Figures of lines and bars show the 12 arms of the highest mean score."
    for name in ("Convergence", "Cost", "Learning rates"):
        assert said in found[name].text
        for part in found[name].parts:
            if isinstance(part, Lines):
                assert {series.name for series in part.series} == wanted
            elif isinstance(part, Bars):
                assert set(part.bars) == wanted
    assert sum(isinstance(part, Lines) for one in found.values() for part in one.parts) == 5
    # Numbers of the best: one for each task and for the average.
    assert Page(render_page(summary)).tags.count("strong") >= 4


@pytest.mark.parametrize(
    ("means", "best"),
    [((0.5, 0.6), {1}), ((0.60001, 0.60002), {0, 1}), ((0.5, None), set()), ((None,), set())],
)
def test_the_best_of_a_row_is_one_of_several(means: Sequence[float | None], best: set[int]) -> None:
    entries = tuple(None if mean is None else Spread((mean,)) for mean in means)
    assert best_places(Row("task", "emotion", "Classification", entries)) == best


def test_texts_in_the_page_are_escaped() -> None:
    def hostile(cell: Cell) -> CellResult:
        return execute(cell).model_copy(
            update={"category": "<script>a</script>", "notes": ("<img src=x>",), "status": "<b>"}
        )

    page = Page(render_page(compare(MemoryStore(), hostile, tasks=("emotion",))))
    assert not {"img", "b"} & set(page.tags) and page.tags.count("script") == 1
    assert "<script>a</script>" in page.texts


def test_a_page_is_written_whole_or_not_at_all(summary: Summary, tmp_path: Path) -> None:
    path = write_page(summary, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render_page(summary)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(StateError, match="Cannot write the report"):
        write_page(summary, tmp_path / "none" / "report.html")


def test_results_without_curves_or_labels_still_make_a_page() -> None:
    def bare(cell: Cell) -> CellResult:
        return CellResult(metric="a", scores={"a": float("nan")}, trainable=1, base=2)

    summary = compare(MemoryStore(), bare, grid=Grid(), seeds=1)
    page = Page(render_page(summary))
    assert page.open == []
    assert "the preset of each method" in page.texts
    assert any("was evaluated once" in text for text in page.texts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x0.3,x1,x3", "3 values for each arm, the best on validation (x0.3,x1,x3)"),
        ("x3", "the preset of each method, x3"),
        ("1e-3", "0.001 for every arm"),
    ],
)
def test_the_page_says_where_the_learning_rates_come_from(text: str, words: str) -> None:
    tasks = ("emotion",)
    summary = compare(MemoryStore(), tasks=tasks, methods=("lora",), grid=Grid.parse(text))
    texts = Page(render_page(summary)).texts
    assert words in texts and "1 method on 1 task" in texts


def test_a_method_may_have_settings_of_its_own() -> None:
    store = MemoryStore()
    compare(store, by_method={"lora( rank=4 )": {"base_dropout": True}})
    found = {cell.method: cell.settings for cell, result in summarise(store).final if result}
    assert found["lora(rank=4)"].base_dropout and not found["full"].base_dropout
    assert all(one.learning_rate for one in found.values())


def test_rates_chosen_on_test_rows_are_called_so() -> None:
    summary = compare(MemoryStore(), selection="test")
    assert "the best on test" in str(Page(render_page(summary)).texts)
    for group, choice in summary.choices.items():
        for rate, mean in choice.means.items():
            scores = [
                result.score
                for cell, result in summary.searched
                if result is not None and group.holds(cell) and cell.learning_rate == rate
            ]
            assert len(scores) == len(group.tasks) and mean == pytest.approx(fmean(scores))


def test_an_empty_store_says_so() -> None:
    with pytest.raises(StateError, match="no comparison in this store"):
        summarise(MemoryStore())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"methods": ("lorra",)}, UnknownNameError, "lora"),
        ({"methods": ("lora", "lora()")}, ConfigurationError, "lora stands twice"),
        ({"tasks": ()}, ConfigurationError, "at least 1 item"),
        ({"budget": "soon"}, ConfigurationError, "A budget is a number and a unit"),
        ({"seads": 2}, UnknownNameError, "Did you mean 'seeds'"),
        ({"by_method": {"lorra": {}}}, UnknownNameError, "lora"),
        ({"by_method": {"adapter": {}}}, UnknownNameError, "method with settings of its own"),
        ({"by_method": {"bitfit": {"seads": 1}}}, UnknownNameError, "Did you mean 'seed'"),
        ({"by_method": {"bitfit": {"learning_rate": 1.0}}}, ConfigurationError, "from the grid"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(MemoryStore(), **fields)
