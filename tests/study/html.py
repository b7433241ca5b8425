"""A page as a test reads it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"link", "meta", "wbr"}  # elements that are never closed


class Page(HTMLParser):
    """Collects what a page refers to, its texts, and the tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.cells: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append(("", dict(attrs)))
        self._see(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [v or "" for name, v in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            text, attributes = self.cells[-1]
            self.cells[-1] = (text + data, attributes)
