"""The page of a comparison in Chromium."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.study.fake import TASKS, execute

from deltatune.study.comparison import Comparison, run_comparison
from deltatune.study.page import sections
from deltatune.study.report import write
from deltatune.study.section import Column, Listing, Section, Table
from deltatune.study.store import MemoryStore
from deltatune.study.summary import Spread, summarise

SORTED = Table(
    "To sort",
    (Column("Name"), Column("Score", "score"), Column("Size", "count")),
    (
        ("run 10", Spread((0.5, 0.7)), 9),
        ("run 9", None, 1e6),
        ("run 1", 0.0725, 200),
        ("Average", 0.99, 1),
    ),
    averages=frozenset([3]),
)
LONG = Table(
    "To break",
    (Column("Name"), Column("name_without_a_place_to_break_" * 3, "score"), Column("Text")),
    (("lora(at='attention.q|attention.k|attention.v|ffn.up')", 0.5, "word_" * 20),),
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = MemoryStore()
    methods = ("full", "lora(rank=4)", "bitfit", "adapter", "prompt")
    comparison = Comparison(backbones=("t5-mini",), tasks=tuple(TASKS), methods=methods)
    run_comparison(comparison, execute, store)
    found = [Section("First", "the paper " * 9, parts=(SORTED,)), *sections(summarise(store))]
    found.append(Section("Last", parts=(LONG, Listing("study.json", "word" * 200))))
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write(path, "Title " * 9, "word" * 60, [("fact" * 9, "v" * 200)], found).as_uri()


def open_at(browser: Any, address: str, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)


def names(browser: Any) -> list[str]:
    rows = browser.find_elements("css selector", "#section-1 tbody th")
    return [row.text for row in rows]


def states(browser: Any) -> list[str]:
    heads = browser.find_elements("css selector", "#section-1 thead th")
    return [head.get_attribute("aria-sort") for head in heads]


def test_headers_sort_by_click_and_by_key(browser: Any, address: str) -> None:
    browser.get(address)
    given = ["run 10", "run 9", "run 1", "Average"]
    assert names(browser) == given and states(browser) == ["none"] * 3
    name, score, size = browser.find_elements("css selector", "#section-1 thead button")
    score.click()
    assert names(browser) == ["run 1", "run 10", "run 9", "Average"], "missing last"
    assert states(browser) == ["none", "ascending", "none"]
    score.send_keys(" ")
    assert names(browser) == ["run 10", "run 1", "run 9", "Average"], "missing last this way too"
    assert states(browser) == ["none", "descending", "none"]
    score.send_keys("\ue007")
    assert names(browser) == given and states(browser) == ["none"] * 3
    size.click()
    assert names(browser) == ["run 10", "run 1", "run 9", "Average"], "as numbers"
    name.click()
    assert names(browser) == ["run 1", "run 9", "run 10", "Average"]
    assert states(browser) == ["ascending", "none", "none"]


def test_the_page_asks_the_network_for_nothing_and_complains_of_nothing(
    browser: Any, address: str
) -> None:
    browser.get(address)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
        # The browser's own pages are of no concern.
        and message["params"]["documentURL"] == address
    ]
    assert [url for url in asked if not url.startswith("data:")] == [address]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, address: str, width: int) -> None:
    open_at(browser, address, width)
    root = browser.find_element("css selector", "html")
    assert root.get_property("clientWidth") <= width
    assert root.get_property("scrollWidth") <= width
    boxes = browser.find_elements("css selector", ".table .scroll")
    hidden = [box.get_property("scrollWidth") > box.get_property("clientWidth") for box in boxes]
    assert any(hidden) == (width == 360), "wide tables scroll in boxes of their own"
    for text in browser.find_elements("css selector", "svg text"):
        assert text.size["height"] > 6.5, "letters can be read"


def test_what_is_wide_fits_on_paper(browser: Any, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    open_at(browser, address, 720)
    assert browser.find_element("css selector", "html").get_property("scrollWidth") <= 720


@pytest.mark.parametrize("width", [360, 1280])
def test_a_listing_opens_by_a_click_and_scrolls_by_itself(
    browser: Any, address: str, width: int
) -> None:
    open_at(browser, address, width)
    text = browser.find_element("css selector", "pre")
    assert not text.is_displayed()
    browser.find_element("css selector", "summary").click()
    assert text.is_displayed() and text.text == "word" * 200
    assert text.get_property("scrollWidth") > text.get_property("clientWidth")
    assert browser.find_element("css selector", "html").get_property("scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 1280])
def test_no_text_runs_into_the_next_cell(browser: Any, address: str, width: int) -> None:
    open_at(browser, address, width)
    cells = browser.find_elements("css selector", "th, td")
    wide = [cell for cell in cells if cell.get_property("scrollWidth") > 1 + cell.size["width"]]
    assert [cell.text for cell in wide] == []
