"""`flowmesh loss TASK`: a training task's loss over its steps, as a chart in the terminal, an SVG or a PNG."""

from __future__ import annotations

import html
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flowmesh.cli import chart, completing, locate, render
from flowmesh.cli.control import Control, Refused
from flowmesh.errors import EXIT_OK, ConfigError, FlowMeshError, UnavailableError
from flowmesh.files.folder import Folder, open_file
from flowmesh.messages import wire

MOST_BYTES = 256 << 20
"""Of a result; a longer one is not read."""
_LINES = 14
BLANK = "\u2800"
"""The braille character without dots."""
_DEPTH = 4
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900, 420, 70, 40, 20, 40
"""Of a picture, and its margins, in pixels."""

Points = list[tuple[float, float]]


@click.command(help="Show the loss of a training task over its steps: of one that has ended, or so far.")
@click.argument("task_id", metavar="TASK", shell_complete=completing.kept_ids)
@click.option("--svg", type=click.Path(dir_okay=False), metavar="FILE", help="Write an SVG.")
@click.option("--png", type=click.Path(dir_okay=False), metavar="FILE", help="Write a PNG; needs Pillow.")
@locate.node_options
def loss(
    *, task_id: str, svg: str | None, png: str | None, config: str | None, state_dir: str | None, as_json: bool
) -> int:
    """Run the command; returns the exit code."""
    if wire.usable_task_id(task_id) is None:
        raise click.UsageError(f"TASK: invalid task id {task_id!r}")
    points, so_far = _points(task_id, config, state_dir)
    if not points:
        raise FlowMeshError(f"{task_id}: no loss is known: is it a training task that has logged one?")
    for option, name, write in (("--svg", svg, _write_svg), ("--png", png, _write_png)):
        if name is not None:
            try:
                write(Path(name), task_id, points)
            except OSError as error:
                raise FlowMeshError(f"{option}: {name} cannot be written: {error.strerror or error}") from None
    if as_json:
        render.print_json({"task_id": task_id, "so_far": so_far, "points": points})
    elif svg is None and png is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # the terminal may lack the characters of the chart
        print("\n".join(drawn(task_id, points, render.width(sys.stdout), so_far=so_far)))
    return EXIT_OK


def drawn(task_id: str, points: Points, width: int, *, so_far: bool = False) -> list[str]:
    """The chart in characters, no line longer than `width`."""
    values = [value for _, value in points]
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    size = max(len(low), len(high))
    lines = chart.braille(points, max(10, width - size - 3), _LINES)
    labels = [high, *[""] * (_LINES - 2), low]
    first, last = f"{points[0][0]:g}", f"{points[-1][0]:g}"
    axis = "part of the run" if so_far else "step"
    foot = (
        f"{first} {axis} {last}"
        if len(first) + len(last) + len(axis) + 2 > len(lines[0])
        else (f"{first}{axis:^{len(lines[0]) - len(first) - len(last)}}{last}")
    )
    head = f"loss of {task_id}{' so far' if so_far else ''}: {points[0][1]:.4g} to {points[-1][1]:.4g}"
    body = [f"{label:>{size}} ┤{line.rstrip(BLANK)}" for label, line in zip(labels, lines, strict=True)]
    return [render.shorten(head, width), *body, " " * (size + 2) + foot]


def as_svg(task_id: str, points: Points) -> str:
    """The chart as an SVG document."""
    place, ticks = _placed(points), _ticks(points)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    texts = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>' for x, y, anchor, text in ticks
    )
    title = html.escape(render.printable(f"loss of {task_id}"))
    box = f'x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_HEIGHT - _TOP - _BOTTOM}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<rect {box} fill="none" stroke="#999"/>\n<text x="{_LEFT}" y="24" font-size="16">{title}</text>\n{texts}\n'
        f'<polyline points="{line}" fill="none" stroke="#1f6fb4" stroke-width="2"/>\n</svg>\n'
    )


def _placed(points: Points) -> Points:
    low_x, high_x = points[0][0], points[-1][0]
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return [
        (
            _LEFT + width * ((x - low_x) / (high_x - low_x) if high_x > low_x else 0.5),
            _TOP + height * (1 - ((y - low_y) / (high_y - low_y) if high_y > low_y else 0.5)),
        )
        for x, y in points
    ]


def _ticks(points: Points) -> list[tuple[int, int, str, str]]:
    values = [value for _, value in points]
    return [
        (_LEFT - 6, _TOP + 10, "end", f"{max(values):.4g}"),
        (_LEFT - 6, _HEIGHT - _BOTTOM, "end", f"{min(values):.4g}"),
        (_LEFT, _HEIGHT - 16, "start", f"step {points[0][0]:g}"),
        (_WIDTH - _RIGHT, _HEIGHT - 16, "end", f"{points[-1][0]:g}"),
    ]


def _write_svg(file: Path, task_id: str, points: Points) -> None:
    file.write_text(as_svg(task_id, points))


def _write_png(file: Path, task_id: str, points: Points) -> None:
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise ConfigError("--png needs Pillow: `pip install pillow`, or use --svg") from None
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM), outline="#999999")
    draw.text((_LEFT, 12), render.printable(f"loss of {task_id}"), fill="black")
    for x, y, anchor, text in _ticks(points):
        draw.text((x, y), text, fill="black", anchor="rs" if anchor == "end" else "ls")
    draw.line(_placed(points), fill="#1f6fb4", width=2)
    image.save(file, format="PNG")


def _points(task_id: str, config: str | None, state_dir: str | None) -> tuple[Points, bool]:
    """The loss by step, and whether these are only the points that a running node keeps of a task that goes on."""
    out_dir = locate.results_dir(None, config).resolve() / task_id
    try:
        with Control(locate.state_dir(state_dir, config)) as control:
            status = control.status_json(0)
            for task in status.get("tasks") or ():
                if task.get("task_id") == task_id:
                    values = (task.get("trend") or {}).get("loss") or []
                    return [(float(number), float(value)) for number, value in enumerate(values)], True
            out_dir = Path(control.logs(task_id).out_dir)
    except (Refused, UnavailableError):  # the results folder may have it all the same
        pass
    return logged(out_dir), False


def logged(out_dir: Path) -> Points:
    """The loss by step in the result of a task that has ended.

    Raises:
        FlowMeshError: the result cannot be read.
    """
    return history_of(_result(out_dir))


def in_a_line(values: Sequence[float], width: int) -> str:
    """The first and the last loss, and the course between them as a sparkline; empty without a value.

    Args:
        width: of the sparkline at most, in characters.
    """
    if not values:
        return ""
    line = chart.spark(values, width)
    try:
        line.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        line = line.translate(chart.ASCII)
    return f"{values[0]:.4g} {line} {values[-1]:.4g}"


def _result(out_dir: Path) -> Any:
    """What is in its responses.json. The task could write to its folder: no link is followed."""
    try:
        with Folder.open(out_dir) as folder:
            if os.geteuid() != 0:
                folder.owner = os.geteuid()
            with folder.below([]) as inside, os.fdopen(open_file(inside, "responses.json", folder.owner), "rb") as file:
                data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise FlowMeshError(f"{out_dir}/responses.json: over {MOST_BYTES >> 20} MiB")
        return json.loads(data)
    except FileNotFoundError:
        raise FlowMeshError(f"{out_dir}/responses.json does not exist: the task has no result on this node") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FlowMeshError(f"{out_dir}/responses.json cannot be read: {error}") from None


def history_of(result: Any, depth: int = _DEPTH) -> Points:
    """The first `loss_history` in a result, as points of step and loss; those that are no numbers are left out."""
    if not isinstance(result, dict) or depth == 0:
        return []
    found = result.get("loss_history")
    if isinstance(found, list):
        points = [
            (float(each["step"]), float(each["loss"]))
            for each in found
            if isinstance(each, dict) and _is_number(each.get("step")) and _is_number(each.get("loss"))
        ]
        return sorted(points)
    return next((points for each in result.values() if (points := history_of(each, depth - 1))), [])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
