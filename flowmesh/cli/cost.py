"""`flowmesh cost`: what the tasks of this node have cost, from the history that its journal keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec

from flowmesh.cli import locate, render
from flowmesh.cli.history import dollars, journal_of, since_option, since_time, table
from flowmesh.cli.render import Column
from flowmesh.errors import EXIT_OK
from flowmesh.tasks import history

JOULES_PER_KWH = 3.6e6
_COLUMNS = (
    Column("OF", least=16),
    Column("TASKS"),
    Column("FAILED", drop=1),
    Column("GPU HOURS"),
    Column("ENERGY"),
    Column("SLOTS"),
    Column("API", drop=3),
    Column("POWER", drop=2),
    Column("TOTAL"),
)


class Sum(msgspec.Struct, kw_only=True):
    """What some tasks have used. Money is in US dollars."""

    of: str
    tasks: int = 0
    failed: int = 0
    gpu_hours: float = 0.0
    kwh: float = 0.0
    """Of the tasks whose energy is known."""
    without_energy: int = 0
    """Tasks whose energy is not known."""
    slot_usd: float = 0.0
    """The slots' cost per hour × time."""
    api_usd: float = 0.0
    """What requests to endpoints have cost, by the prices in the documents."""
    energy_usd: float | None = None
    """kwh × --kwh-price; None: no price was given."""

    @property
    def total_usd(self) -> float:
        return self.slot_usd + self.api_usd + (self.energy_usd or 0.0)


@click.command(
    help="Show what the tasks of this node have cost: cost per hour of their slots, paid endpoints, and with "
    "a price their energy."
)
@since_option
@click.option(
    "--by", type=click.Choice(["owner", "type", "task"]), default="type", show_default=True, help="What to sum by."
)
@click.option("--kwh-price", type=click.FloatRange(min=0), metavar="USD", help="Also the price of their energy.")
@locate.node_options
def cost(
    *, since: str | None, by: str, kwh_price: float | None, config: str | None, state_dir: str | None, as_json: bool
) -> int:
    """Run the command; returns the exit code."""
    journal = journal_of(state_dir, config)
    sums = summed(used(journal, None if since is None else since_time(since)), by, kwh_price)
    whole = Sum(of="all")
    for each in sums:
        _add(whole, each)
    if as_json:
        made = [{**msgspec.to_builtins(each), "total_usd": each.total_usd} for each in (*sums, whole)]
        render.print_json({"by": by, "sums": made[:-1], "total": made[-1]})
        return EXIT_OK
    if not sums:
        print("no task has ended on this node" + (f" since {since}" if since else ""))
        return EXIT_OK
    table(_COLUMNS, [_row(each) for each in (*sums, whole)])
    if whole.without_energy:
        print(f"\nenergy of {render.count(whole.without_energy, 'task')} not known, and not counted")
    return EXIT_OK


def used(journal: Path, since: str | None) -> Iterator[history.Entry]:
    """The tasks that ended on the node, from its journal.

    Raises:
        JournalError: it cannot be read.
    """
    return history.entries(journal, since=since)


def summed(entries: Iterable[history.Entry], by: str, kwh_price: float | None) -> list[Sum]:
    """Sums by owner, type or task, the dearest first."""
    sums: dict[str, Sum] = {}
    for entry in entries:
        name = {"owner": entry.owner, "type": entry.type, "task": entry.task_id}[by] or "(none)"
        one = Sum(
            of=name, tasks=1, failed=int(not entry.ok), gpu_hours=entry.gpu_s / 3600, slot_usd=entry.cost_usd or 0.0
        )
        one.kwh, one.without_energy = (entry.joules or 0.0) / JOULES_PER_KWH, int(entry.joules is None)
        one.api_usd = entry.api_usd or 0.0
        one.energy_usd = None if kwh_price is None else one.kwh * kwh_price
        _add(sums.setdefault(name, Sum(of=name)), one)
    return sorted(sums.values(), key=lambda each: (-each.total_usd, each.of))


def _add(total: Sum, one: Sum) -> None:
    total.tasks += one.tasks
    total.failed += one.failed
    total.gpu_hours += one.gpu_hours
    total.kwh += one.kwh
    total.without_energy += one.without_energy
    total.slot_usd += one.slot_usd
    total.api_usd += one.api_usd
    if one.energy_usd is not None:
        total.energy_usd = (total.energy_usd or 0.0) + one.energy_usd


def _row(each: Sum) -> list[str]:
    known = each.tasks > each.without_energy
    return [
        each.of,
        str(each.tasks),
        str(each.failed),
        f"{each.gpu_hours:.2f}" if each.gpu_hours else "",
        f"{each.kwh:.3g} kWh" if known else "",
        dollars(each.slot_usd),
        dollars(each.api_usd) if each.api_usd else "",
        dollars(each.energy_usd),
        dollars(each.total_usd),
    ]
