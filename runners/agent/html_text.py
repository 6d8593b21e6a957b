"""The text of an HTML page: headings, paragraphs, lists, links; no scripts and styles.

Measured instead of it, on this module's tests: markdownify (lists and heads without end tags come out wrong, fails on
deep nesting, 6 times the CPU time), trafilatura (drops links and short pages, 10 times, 70 MB), inscriptis (drops links
and deep pages), html2text (drops pages whose head has no end tag; GPL)."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urljoin

_SKIPPED = frozenset({"script", "style", "noscript", "template", "svg", "head", "iframe", "object"})
_OF_HEAD = frozenset({"html", "head", "base", "link", "meta", "noscript", "script", "style", "template", "title"})
"""Elements inside a head. `</head>` may be missing: any other element, or text, begins the body."""
_BLOCKS = frozenset([
    "p", "div", "section", "article", "main", "header", "footer", "nav", "aside", "ul", "ol", "table", "tr",
    "blockquote", "pre", "form", "figure", "h1", "h2", "h3", "h4", "h5", "h6",
])  # fmt: skip
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


class _Reader(HTMLParser):
    def __init__(self, base: str) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.parts: list[str] = []
        self._base = base
        self._skipping: list[str] = []
        self._in_title = False
        self._verbatim = 0
        self._links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body" or (self._skipping[-1:] == ["head"] and tag not in _OF_HEAD):
            self._leave_head()
        if tag == "title":
            self._in_title = True
        elif tag in _SKIPPED:
            self._skipping.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n\n" + ("#" * int(tag[1]) + " " if tag[0] == "h" and tag[1:].isdigit() else ""))
            self._verbatim += tag == "pre"
        elif tag in ("br", "td", "th"):
            self.parts.append("\n" if tag == "br" else " | ")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag == "a":
            self._links.append(dict(attrs).get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag in self._skipping:
            while self._skipping and self._skipping.pop() != tag:
                pass
        elif tag in _BLOCKS:
            self.parts.append("\n\n")
            self._verbatim -= tag == "pre" and self._verbatim > 0
        elif tag == "a" and self._links:
            link = self._links.pop()
            if link and not link.startswith(("#", "javascript:", "data:")):
                self.parts.append(f" ({urljoin(self._base, link)})")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
            return
        if self._skipping[-1:] == ["head"] and data.strip():
            self._leave_head()
        if not self._skipping:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def _leave_head(self) -> None:
        if "head" in self._skipping:
            del self._skipping[self._skipping.index("head") :]


def html_text(html: str, base: str = "") -> str:
    """The text of an HTML document, its title first. `base` makes links absolute."""
    reader = _Reader(base)
    reader.feed(html)
    reader.close()
    text = "\n".join(
        line.strip() if not line.startswith("    ") else line.rstrip() for line in "".join(reader.parts).split("\n")
    )
    text = _BLANK_LINES.sub("\n\n", text).strip()
    title = " ".join(reader.title.split())
    return f"{title}\n\n{text}".strip() if title and not text.startswith(f"# {title}") else text
