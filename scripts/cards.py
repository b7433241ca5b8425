"""Writes the tables of docs/methods.md from the cards of what the package brings."""

from __future__ import annotations

import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from deltatune.core.card import Card, cards  # noqa: E402
from deltatune.core.method import METHODS  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- made by `make cards` -->\n", "<!-- end of what `make cards` made -->"
QV = "attention.q | attention.v"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars within cells are kept from parting them."""
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (head, *rows)]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def code(names: Iterable[str]) -> str:
    """Names in the type of code."""
    return ", ".join(f"`{name}`" for name in names)


def method_row(card: Card) -> tuple[str, ...]:
    """What the table of methods says of one."""
    return (
        code([card.name]),
        code(card.aliases),
        card.category,
        card.review_category,
        code(card.faces),
        "QV" if card.at == QV else code([card.at or ""]),
        card.count,
        "yes" if card.identity else "no",
        "yes" if card.mergeable else "no",
        card.paper,
    )


def rates(methods: Iterable[Card]) -> str:
    """The learning rates, as a block of code that says whether they are still the methods' own."""
    names = defaultdict(list)
    for card in methods:
        names[card.learning_rate].append(card.name)
    lines = ["from deltatune.core.method import METHODS", "", "by_rate = {"]
    for rate in sorted(names):
        listed = textwrap.fill(" ".join(names[rate]), 88, subsequent_indent=" " * 8)
        lines.append(f'    {rate:g}: """{listed}""",')
    lines += ["}", "rates = {name: rate for rate in by_rate for name in by_rate[rate].split()}"]
    lines.append("assert rates == {name: METHODS[name].learning_rate for name in rates}")
    return "```python\n" + "\n".join(lines) + "\n```"


def made() -> str:
    """The tables, from what this package brings alone."""
    ours = [card for card in cards() if not is_foreign(card)]
    methods = [card for card in ours if card.kind == "method" and card.works]
    head = (
        *("method", "aliases", "category", "after Xu et al.", "face", "default target"),
        *("count per site", "identity at the start", "merges", "paper"),
    )
    presets = [card for card in ours if card.kind == "preset"]
    return "\n\n".join(
        [
            table(head, map(method_row, methods)),
            "Learning rates to start from:",
            rates(methods),
            "Presets:",
            table(
                ("preset", "aliases", "stands for", "after Xu et al.", "merges", "paper"),
                [
                    (
                        code([card.name]),
                        code(card.aliases),
                        code([card.expression or ""]),
                        card.review_category,
                        "yes" if card.mergeable else "no",
                        card.paper,
                    )
                    for card in presets
                ],
            ),
            "What does not work here, why, and what comes nearest:",
            table(
                ("name", "why not", "nearest", "paper"),
                [
                    (code([card.name]), card.reason or "", code([card.nearest or ""]), card.paper)
                    for card in ours
                    if not card.works
                ],
            ),
        ]
    )


def is_foreign(card: Card) -> bool:
    """Whether another distribution brings what the card is of."""
    if card.nearest is not None or card.kind == "preset":
        return False
    return not card.works or not METHODS[card.name].__module__.startswith("deltatune.methods.")


def page(text: str) -> str:
    """The page with the tables as they are now."""
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{before}{made()}\n\n{after}"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
