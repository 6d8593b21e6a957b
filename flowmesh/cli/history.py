"""`flowmesh history`: the tasks that ended on this node, from its journal, whether or not the node runs."""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
import msgspec

from flowmesh.cli import completing, locate, render
from flowmesh.cli.render import Column
from flowmesh.errors import EXIT_OK, FieldError
from flowmesh.tasks import history as kept
from flowmesh.tasks.history import Entry
from flowmesh.tasks.journal_db import JOURNAL_FILE
from flowmesh.tasks.verdicts import Kind

DEFAULT_LIMIT = 30
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_COLUMNS = (
    Column("ENDED"),
    Column("TASK", least=12),
    Column("TYPE", least=6),
    Column("OWNER", least=5, drop=4),
    Column("VERDICT"),
    Column("TIME"),
    Column("GPU", drop=3),
    Column("ENERGY", drop=2),
    Column("TOKENS", drop=5),
    Column("COST", drop=1),
)
_SUMS = (
    Column("OWNER", least=5),
    Column("TYPE", least=6),
    Column("TASKS"),
    Column("FAILED"),
    Column("TIME"),
    Column("GPU"),
    Column("ENERGY"),
    Column("TOKENS", drop=1),
    Column("COST"),
)


class Sums(msgspec.Struct, kw_only=True):
    """What tasks used together."""

    tasks: int = 0
    failed: int = 0
    wall_s: float = 0.0
    gpu_hours: float = 0.0
    joules: float = 0.0
    """Of those whose energy is known."""
    tokens: int = 0
    cost_usd: float = 0.0

    def add(self, entry: Entry) -> None:
        self.tasks += 1
        self.failed += not entry.ok
        self.wall_s += entry.wall_s
        self.gpu_hours += entry.gpu_s / 3600
        self.joules += entry.joules or 0.0
        self.tokens += entry.tokens or 0
        self.cost_usd += entry.cost_usd or 0.0


since_option = click.option(
    "--since", metavar="AGE|TIME", help="Only later ones: 30min, 12h, 2d, or 2026-11-28[T10:00]."
)


@click.command(help="List the tasks that ended on this node, the last one at the bottom. Works while the node is down.")
@since_option
@click.option("--type", "task_type", metavar="TYPE", help="Only this task type.", shell_complete=completing.types)
@click.option(
    "--verdict",
    type=click.Choice([*map(str, Kind), "failed"]),
    metavar="KIND",
    help="Only this verdict, such as ok, crash or gpu_oom; failed: all but ok.",
)
@click.option("--owner", metavar="NAME", help="Only this owner's, as the document's metadata names one.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help=f"The last N; {DEFAULT_LIMIT} without --since or --sum."
)
@click.option("--sum", "by_group", is_flag=True, help="Sums by owner and type instead of the tasks.")
@locate.node_options
def history(
    *,
    since: str | None,
    task_type: str | None,
    verdict: str | None,
    owner: str | None,
    limit: int | None,
    by_group: bool,
    config: str | None,
    state_dir: str | None,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    journal = journal_of(state_dir, config)
    start = None if since is None else since_time(since)
    bound = limit or (None if since is not None or by_group else DEFAULT_LIMIT)
    exact = verdict if verdict != "failed" else None
    found = kept.entries(
        journal, since=start, type=task_type, verdict=exact, owner=owner, limit=bound if verdict != "failed" else None
    )
    listed = list(_first(found, bound, lambda entry: verdict != "failed" or not entry.ok))
    sums, total = groups(listed)
    if as_json:
        parts = [{"owner": name, "type": kind, **msgspec.to_builtins(part)} for (name, kind), part in sums.items()]
        tasks = [] if by_group else [whole(entry) for entry in listed]
        render.print_json({"tasks": tasks, "total": msgspec.to_builtins(total), "sums": parts})
        return EXIT_OK
    if not listed:
        print(f"no task in {journal}" + (" matches" if any((since, task_type, verdict, owner)) else " has ended"))
    elif by_group:
        ordered = sorted(sums.items(), key=lambda item: (-item[1].cost_usd, item[0]))
        table(_SUMS, [_sum_row(*group, part) for group, part in ordered])
    else:
        table(_COLUMNS, [_row(entry) for entry in reversed(listed)])
    if listed:
        print(f"\n{_total(total)}")
    if bound is not None and limit is None and len(listed) == bound:
        print(f"the last {bound}; more with --limit or --since")
    return EXIT_OK


def journal_of(state_dir: str | None, config: str | None) -> Path:
    """The journal of the node on this machine."""
    return locate.state_dir(state_dir, config) / JOURNAL_FILE


def whole(entry: Entry) -> dict[str, object]:
    """An entry with all its fields, for JSON."""
    return {field: getattr(entry, field) for field in entry.__struct_fields__}


def groups(entries: Iterable[Entry]) -> tuple[dict[tuple[str, str], Sums], Sums]:
    """Sums by (owner, type), and of all."""
    parts: dict[tuple[str, str], Sums] = {}
    total = Sums()
    for entry in entries:
        parts.setdefault((entry.owner, entry.type), Sums()).add(entry)
        total.add(entry)
    return parts, total


def since_time(text: str, now: datetime.datetime | None = None) -> str:
    """The time that `--since` names, in UTC, ISO 8601.

    Args:
        text: an age such as 2d, or a date with or without time, which is local where it names no zone.

    Raises:
        FieldError: it is neither.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        if age := _AGE.fullmatch(text.strip()):
            then = now - datetime.timedelta(seconds=float(age[1]) * _UNITS[age[2]])
        else:
            then = datetime.datetime.fromisoformat(text.strip()).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise FieldError(f"--since: {text!r} is neither an age such as 30min, 12h, 2d nor a date", "since") from None
    return then.isoformat()


def short_time(at: str | None) -> str:
    """A time of the journal in local time: without the day for today, without the year for this one."""
    try:
        then = datetime.datetime.fromisoformat(at or "").astimezone()
    except (ValueError, OverflowError):
        return ""
    now = datetime.datetime.now().astimezone()
    if then.date() == now.date():
        return then.strftime("%H:%M:%S")
    return then.strftime("%m-%d %H:%M" if then.year == now.year else "%Y-%m-%d")


def energy(joules: float | None) -> str:
    if joules is None:
        return ""
    for size, unit in ((3.6e6, "kWh"), (1e3, "kJ")):
        if joules >= size:
            return f"{joules / size:.1f} {unit}"
    return f"{joules:.0f} J" if joules >= 10 else f"{joules:.2g} J"


def dollars(cost: float | None) -> str:
    if cost is None:
        return ""
    return f"${cost:.2f}" if cost >= 1 or not cost else f"${cost:.4f}" if cost >= 0.0001 else "<$0.0001"


def number(count: int | None) -> str:
    if count is None:
        return ""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.1f}{unit}"
    return str(count)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal without the columns that are empty: on most nodes some always are."""
    fitted = render.is_terminal(sys.stdout)
    shown = [index for index in range(len(columns)) if not fitted or any(row[index] for row in rows)]
    render.table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])


def _first(entries: Iterable[Entry], bound: int | None, fits: Callable[[Entry], bool]) -> Iterable[Entry]:
    left = bound
    for entry in entries:
        if left == 0:
            return
        if fits(entry):
            yield entry
            left = None if left is None else left - 1


def _row(entry: Entry) -> Sequence[str]:
    return (
        short_time(entry.finished_at),
        entry.task_id,
        entry.type,
        entry.owner,
        entry.verdict,
        render.seconds(entry.wall_s) if entry.started_at else "",
        render.seconds(entry.gpu_s) if entry.gpu_s else "",
        energy(entry.joules),
        number(entry.tokens),
        dollars(entry.cost_usd),
    )


def _sum_row(owner: str, task_type: str, part: Sums) -> Sequence[str]:
    return (
        owner,
        task_type,
        str(part.tasks),
        str(part.failed or ""),
        render.seconds(part.wall_s),
        f"{part.gpu_hours:.2f} h" if part.gpu_hours else "",
        energy(part.joules or None),
        number(part.tokens or None),
        dollars(part.cost_usd),
    )


def _total(total: Sums) -> str:
    parts = [render.count(total.tasks, "task")]
    if total.failed:
        parts.append(f"{total.failed} failed")
    parts.append(render.seconds(total.wall_s))
    if total.gpu_hours:
        parts.append(f"{total.gpu_hours:.2f} GPU hours")
    if total.joules:
        parts.append(energy(total.joules))
    if total.tokens:
        parts.append(f"{number(total.tokens)} tokens")
    parts.append(dollars(total.cost_usd))
    line = ", ".join(parts)
    return line if len(line) <= render.width(sys.stdout) else line[: render.width(sys.stdout)]
