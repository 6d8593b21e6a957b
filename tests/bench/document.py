"""The page of the measurements: parts, each replaced by a run of its own; what stands outside of them is kept.

A part is what is between `<!-- bench NAME -->` and `<!-- end of NAME -->`. Its heading and its notes are outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.bench.measure import Row

HEADINGS: Mapping[str, str] = {
    "floor": "Floors of the machine",
    "echo": "Echo",
    "fleet": "The queue",
    "scale": "How far one Redis reaches",
    "long": "Long runs",
    "peers": "Peers",
    "rest": "The supervisor at rest",
    "top": "`flowmesh top`",
    "page": "The page",
    "exec": "Commands in a running task",
    "isolation": "Under load",
    "gpus": "GPUs",
    "inference": "Inference",
    "ahead": "The gap between two tasks",
    "first": "The first task",
    "rows": "The row log",
    "vllm": "vLLM",
    "training": "Training",
    "rag": "FAISS",
    "delivery": "Delivery",
}
"""By module, in the order in which they run and stand on the page."""


def part(circumstances: str, rows: Sequence[Row]) -> str:
    """The text of one part: under which circumstances it was measured, and its table."""
    lines = [circumstances, "", "| what | measured | against | aim |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(map(_cell, _cells(row)))} |" for row in rows])


def replaced(page: str, name: str, text: str) -> str:
    """The page with a part's text replaced. A part that it does not have gets a heading, after those that precede it.

    Raises:
        ValueError: the page has the part's begin without its end.
    """
    begin, end = f"<!-- bench {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{text}\n{end}"
    head, found, rest = page.partition(begin)
    if found:
        _, closed, tail = rest.partition(end)
        if not closed:
            raise ValueError(f"the part {name} has no line {end}")
        return head + block + tail
    section = f"## {HEADINGS[name]}\n\n{block}\n"
    following = list(HEADINGS)[list(HEADINGS).index(name) + 1 :]
    for other in following:
        at = page.find(f"<!-- bench {other} -->")
        if at >= 0 and (at := page.rfind("\n## ", 0, at)) >= 0:
            return f"{page[:at]}\n{section}{page[at:]}"
    return f"{page.rstrip()}\n\n{section}"


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.what, row.value, row.against, row.aim


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
