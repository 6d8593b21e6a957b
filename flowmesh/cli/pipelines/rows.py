"""The stages of a pipeline as lines of text: a tree in which a stage is below the one that it waits for last."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import msgspec

from flowmesh.cli.render import seconds, shorten
from flowmesh.pipelines.document import Pipeline
from flowmesh.pipelines.graph import depths
from flowmesh.pipelines.progress import StageRun, State

_NAME = 32
_DEEPEST = 6
_STATE = 9
_FIRST = (State.RUNNING, State.FAILED, State.READY, State.CANCELLED)
"""What is shown of a pipeline with more stages than the terminal has lines."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line."""

    label: str
    state: State | None
    """None: the line stands for several stages."""
    text: str


def tree_order(pipeline: Pipeline) -> list[tuple[str, int]]:
    """The stages' names in the order of the tree, each with its level."""
    depth = depths(pipeline.edges)
    children: dict[str | None, list[str]] = {}
    place = {stage.name: number for number, stage in enumerate(pipeline.stages)}
    for stage in pipeline.stages:
        above = max(stage.depends_on, key=lambda name: (depth[name], place[name]), default=None)
        children.setdefault(above, []).append(stage.name)
    order: list[tuple[str, int]] = []
    stack = [(name, 0) for name in reversed(children.get(None, []))]
    while stack:
        name, level = stack.pop()
        order.append((name, level))
        below = children.get(name, [])
        stack += [(child, level + 1) for child in reversed(below)]
    return order


def rows(
    order: Iterable[tuple[str, int]], runs: Mapping[str, StageRun], *, most: int | None = None, now: float | None = None
) -> list[Row]:
    """The lines of a pipeline.

    Args:
        order: as from `tree_order`.
        most: not more lines than this; None: all.
        now: monotonic; for the time of what runs.
    """
    listed = list(order)
    kept = {name for name, _ in listed}
    if most is not None and len(listed) > most:
        ranked = sorted(listed, key=lambda each: runs[each[0]].state not in _FIRST)
        kept = {name for name, _ in ranked[: max(1, most - 1)]}
    made = [_row(runs, name, level, now) for name, level in listed if name in kept]
    if len(kept) < len(listed):
        others = [runs[name].state for name, _ in listed if name not in kept]
        counted = ", ".join(f"{others.count(state)} {state.value}" for state in State if state in others)
        made.append(Row(label=f"… and {len(others)} more", state=None, text=counted))
    return made


def _row(runs: Mapping[str, StageRun], name: str, level: int, now: float | None) -> Row:
    run = runs[name]
    return Row(label="  " * min(level, _DEEPEST) + shorten(name, _NAME), state=run.state, text=_about(run, runs, now))


def _about(run: StageRun, runs: Mapping[str, StageRun], now: float | None) -> str:
    match run.state:
        case State.WAITING:
            others = [name for name in run.stage.depends_on if not runs[name].state.ended]
            return f"for {shorten(', '.join(others), 60)}" if others else ""
        case State.READY:
            return "for a slot"
        case State.RUNNING:
            since = time.monotonic() if now is None else now
            took = seconds(since - run.started) if run.started is not None else ""
            percent = f"{run.fraction:4.0%}" if run.fraction is not None else ""
            together = f"with {run.merged_into}" if run.merged_into else ""
            return "  ".join(filter(None, (took, together, percent, run.seen)))
        case State.SUCCEEDED:
            together = f"with {run.merged_into}" if run.merged_into else ""
            parts = f"{len(run.parts)} shards" if len(run.parts) > 1 else ""
            return "  ".join(filter(None, (seconds(run.seconds) if run.seconds is not None else "", together, parts)))
        case State.REUSED:
            return "the result of an earlier run"
        case State.SKIPPED:
            return "its condition is false"
        case State.FAILED if run.verdict not in (None, "error", "bad_request"):
            return f"({run.verdict}) {run.error or ''}"
        case State.FAILED | State.BLOCKED | State.CANCELLED:
            return run.error or ""


def lines(made: Iterable[Row], width: int) -> list[str]:
    """Rows as text of at most `width` columns."""
    every = list(made)
    size = max((len(row.label) for row in every), default=0)
    found = []
    for row in every:
        if row.state is None:
            found.append(shorten_end(f"{row.label}: {row.text}", width))
            continue
        start = f"{row.label:<{size}}  {row.state.value:<{_STATE}}"
        found.append(shorten_end(f"{start}  {row.text}".rstrip(), width))
    return found


def shorten_end(text: str, width: int) -> str:
    """`text` on one line of `width` columns, with its indentation."""
    indent = len(text) - len(text.lstrip())
    return " " * indent + collapse(text[indent:], max(10, width - indent))


def collapse(text: str, room: int) -> str:
    plain = " ".join(text.splitlines())
    return plain if len(plain) <= room else f"{plain[: room - 1]}…"
