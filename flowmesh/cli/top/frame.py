"""Lays the sections out on a screen: what does not fit is cut by its importance, and says how much was left out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
from rich.text import Text

from flowmesh.cli import render
from flowmesh.cli.top import cells, sections
from flowmesh.cli.top.picture import Picture, Task

MOST_TROUBLES = 3
SMALLEST = 40
"""Columns; a narrower screen is cut."""


class Sort(enum.StrEnum):
    """How running tasks are ordered."""

    SLOT = "slot"
    TIME = "time"
    PROGRESS = "progress"
    ENERGY = "energy"
    COST = "cost"
    NAME = "name"

    def next(self) -> Sort:
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


_KEYS: dict[Sort, Callable[[Task], float]] = {
    Sort.TIME: lambda task: task.elapsed_s or 0.0,
    Sort.PROGRESS: lambda task: (task.done or 0.0) / task.total if task.total else -1.0,
    Sort.ENERGY: lambda task: task.gpu_joules or 0.0,
    Sort.COST: lambda task: task.cost_usd or 0.0,
}


def ordered(picture: Picture, by: Sort) -> Picture:
    """The picture with its running tasks in this order: the largest first, names from A."""
    if by is Sort.SLOT:
        return picture
    if by is Sort.NAME:
        running = sorted(picture.running, key=lambda task: task.task_id)
    else:
        running = sorted(picture.running, key=_KEYS[by], reverse=True)
    return msgspec.structs.replace(picture, running=tuple(running))


class Section(NamedTuple):
    """A section and how many of its lines are shown."""

    title: Text
    lines: list[Text]
    """All of them; the headers of its columns first, where it has any."""
    least: int
    """Lines that it gets before another one gets more than its own least."""
    noun: str = ""
    """What is counted where lines are left out; empty: it is shown whole or not at all."""
    unlisted: int = 0
    """How many it has beyond its lines."""
    header: bool = True
    """Whether the first line is the columns' header."""
    focus: int | None = None
    """The line of the selected task, which is shown in any case."""

    @property
    def whole(self) -> int:
        """Lines that it takes in full."""
        return len(self.lines) + (self.unlisted > 0)


def body(picture: Picture, width: int, height: int | None, selected: str | None = None) -> list[Text]:
    """The sections in at most `height` lines; None: all lines of all of them."""
    width = max(SMALLEST, width)
    found = _sections(picture, width, selected, short=False)
    if height is not None and sum(1 + each.whole for each in found) > height:
        found = _sections(picture, width, selected, short=True)
    rooms = [each.whole for each in found] if height is None else _rooms(found, height)
    spare = 0 if height is None else height - sum(1 + room for room in rooms if room)
    blank = height is None or spare >= sum(room > 0 for room in rooms) - 1
    lines: list[Text] = []
    for section, room in zip(found, rooms, strict=True):
        if room:
            if lines and blank:
                lines.append(Text(""))
            lines += [section.title, *_cut(section, room)]
    return lines if height is None else lines[:height]


def _rooms(found: Sequence[Section], height: int) -> list[int]:
    """How many lines each section gets: the first ones are the most important."""
    rooms = [0] * len(found)
    left = height
    for number in _by_importance(found):
        least = min(found[number].whole, found[number].least)
        if least + 1 <= left:
            rooms[number] = least
            left -= least + 1
    for number in _by_importance(found):
        if rooms[number]:
            more = min(found[number].whole - rooms[number], left)
            rooms[number] += more
            left -= more
    return rooms


_IMPORTANCE = (
    "Running",
    "Slots",
    "Workers",
    "GPUs",
    "Deliveries",
    "Last verdicts",
    "Waiting",
    "Machine",
    "Fork servers",
)


def _by_importance(found: Sequence[Section]) -> list[int]:
    """The sections' numbers; the one with the selected task comes first."""

    def rank(number: int) -> int:
        section = found[number]
        return -1 if section.focus is not None else _IMPORTANCE.index(section.title.plain.partition("  ")[0])

    return sorted(range(len(found)), key=rank)


def _cut(section: Section, room: int) -> list[Text]:
    """The headers and as many lines as fit, the last of which says how many are left out."""
    lines, top = section.lines, int(section.header)
    if room >= section.whole or not section.noun:
        more = [Text(f"   and {section.unlisted} more", style="bright_black")] if section.unlisted else []
        return [*lines, *more][:room]
    if room <= top + 1:
        return [*lines[:top], lines[section.focus or top]][:room]
    shown = room - top - 1
    first = max(top, min(len(lines) - shown, (section.focus or top) - shown + 1))
    left_out = len(lines) - top - shown + section.unlisted
    return [*lines[:top], *lines[first : first + shown], Text(f"   and {left_out} more", style="bright_black")]


def _focus(found: Sequence[Task], selected: str | None) -> int | None:
    """The line of the selected task, below the headers."""
    return next((number for number, task in enumerate(found, 1) if task.task_id == selected), None)


def _sections(picture: Picture, width: int, selected: str | None, *, short: bool) -> list[Section]:
    alone = len(picture.slots) == 1
    found = []
    if picture.of == "deployment":
        lines = sections.workers(picture, width)
        head = sections.title("Workers", _power(picture), _price(picture))
        found.append(Section(head, lines, 4, "worker"))
        if why := sections.reasons(picture, width):
            found.append(Section(sections.title("Slots", "not taking tasks"), why, 2, "worker", header=False))
    else:
        found += _machine(picture, width, short=short)
        lines = sections.slots(picture, width)
        found.append(Section(sections.title("Slots"), lines, min(len(lines), 4), "slot", header=False))
    if picture.running:
        lines = sections.tasks(picture.running, width, selected, alone=alone)
        focus = _focus(picture.running, selected)
        found.append(Section(sections.title("Running", str(len(picture.running))), lines, 7, "task", focus=focus))
    else:
        nothing = [Text("  no task is running", style="bright_black")]
        found.append(Section(sections.title("Running"), nothing, 1, header=False))
    if picture.queued or picture.queue:
        lines = sections.queue(picture.queue, width, selected, alone=alone)
        more = max(0, picture.queued - len(picture.queue))
        focus = _focus(picture.queue, selected)
        found.append(Section(sections.title("Waiting", str(picture.queued)), lines, 2, "task", more, focus=focus))
    if picture.deliveries:
        lines = sections.deliveries(picture.deliveries, width, selected)
        head, focus = sections.title("Deliveries", str(len(picture.deliveries))), _focus(picture.deliveries, selected)
        found.append(Section(head, lines, 3, "delivery", focus=focus))
    if picture.recent:
        found.append(Section(sections.title("Last verdicts"), sections.ends(picture.recent, width), 2, "task"))
    if picture.servers:
        lines = sections.servers(picture.servers, width)
        found.append(Section(sections.title("Fork servers"), lines, len(lines), header=False))
    return found


def _machine(picture: Picture, width: int, *, short: bool) -> list[Section]:
    """The GPUs; CPU and memory too where there is room, or where there are no GPUs."""
    found = []
    if picture.gpus:
        head = sections.title("GPUs", _power(picture), _price(picture))
        if short:
            lines = sections.gpus_short(picture, width)
            found.append(Section(head, lines, min(len(lines), 4), "GPU", header=False))
        else:
            lines = sections.gpus(picture, width)
            found.append(Section(head, lines, len(lines), "GPU"))
    if picture.host is not None and not (short and picture.gpus):
        lines = sections.host(picture.host, width)
        facts = () if picture.gpus else ("no GPU", _price(picture))
        found.append(Section(sections.title("Machine", *facts), lines, len(lines), header=False))
    return found


def _power(picture: Picture) -> str:
    return "" if picture.power_w is None else f"{picture.power_w:.0f} W"


def _price(picture: Picture) -> str:
    return "" if picture.cost_per_hour is None else f"${picture.cost_per_hour:.2f}/h"


def header(picture: Picture, width: int) -> list[Text]:
    """What this is a picture of, and what does not work."""
    counts = [f"{len(picture.running)} running", f"{picture.queued} waiting"]
    if picture.deliveries:
        counts.append(f"{len(picture.deliveries)} delivering")
    about, now = cells.cell(", ".join(filter(None, picture.about)), "bold"), ", ".join(counts)
    lines = [about.append(f"  {now}")] if about.cell_len + 2 + len(now) <= width else [about, Text(now)]
    lines += [cells.cell(trouble, "bold red") for trouble in picture.troubles[:MOST_TROUBLES]]
    if (more := len(picture.troubles) - MOST_TROUBLES) > 0:
        lines.append(Text(f"and {render.count(more, 'more trouble')}", style="bold red"))
    return [cells.fitted(line, width) for line in lines]
