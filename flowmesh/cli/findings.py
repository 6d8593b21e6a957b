"""What `flowmesh doctor` finds, and how it prints it."""

from __future__ import annotations

import enum
import sys
import textwrap
from collections.abc import Iterable

import click
import msgspec

from flowmesh.cli import render

_INDENT = 9


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"
    """Something is absent, and no setting asks for it."""
    WARN = "warn"
    """It works, with a limitation."""
    BROKEN = "broken"


_COLOURS = {Level.OK: "green", Level.NOTE: "blue", Level.WARN: "yellow", Level.BROKEN: "red"}


class Finding(msgspec.Struct, frozen=True):
    """The state of one part of the machine."""

    area: str
    level: Level
    text: str
    remedy: str = ""
    """A command or an instruction; empty where nothing needs to be done."""


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as soon as it is there, under the heading of its area; returns all of them."""
    shown: list[Finding] = []
    width = render.width(sys.stdout)
    for finding in findings:
        if not shown or shown[-1].area != finding.area:
            click.echo(("" if not shown else "\n") + click.style(finding.area, bold=True))
        mark = click.style(f"  {finding.level.value:<6} ", fg=_COLOURS[finding.level])
        click.echo(mark + _wrap(finding.text, width))
        if finding.remedy:
            click.echo(" " * _INDENT + _wrap(f"→ {finding.remedy}", width, more=2))
        shown.append(finding)
    return shown


def count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)


def _wrap(text: str, width: int, more: int = 0) -> str:
    lines = textwrap.wrap(
        render.printable(text), max(20, width - _INDENT), break_on_hyphens=False, subsequent_indent=" " * more
    )
    return f"\n{' ' * _INDENT}".join(lines)
