"""Parser for the HTML pages that tests read."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "br", "img", "input", "circle", "line")


class Page(HTMLParser):
    """Tags with attributes, the text in each kind of tag; every tag must be closed."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.source = Path(path).read_text("utf-8")
        self.feed(self.source)
        assert self.source.startswith("<!doctype html>") and self.open == []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.tags]

    @property
    def links(self) -> list[str]:
        keys = ("src", "href", "xlink:href")
        return [value or "" for _, attrs in self.tags for k, value in attrs.items() if k in keys]

    def having(self, tag: str, attribute: str, other: str = "") -> list[str | None]:
        """Values of an attribute, of tags that have the other too."""
        every = (attrs for name, attrs in self.tags if name == tag and attribute in attrs)
        return [attrs[attribute] for attrs in every if not other or other in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data)
