"""Runs the measurements, prints their tables, and replaces their parts of the page."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.against import PROBES, compare
from tests.bench.document import HEADINGS, part, replaced
from tests.bench.machine import Watched
from tests.bench.measure import Row

OUTPUT = Path("docs/benchmarks.md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"only some of: {', '.join(HEADINGS)}")
    parser.add_argument("--no-write", action="store_true", help=f"leave {OUTPUT} as it is")
    parser.add_argument(
        "--against",
        metavar="REV",
        help="compare the working tree with a commit, in turn; exit with 1 where something takes more than the noise "
        f"explains. --only then takes: {', '.join(PROBES)}",
    )
    options = parser.parse_args()
    names = list(PROBES if options.against else HEADINGS)
    wanted = options.only.split(",") if options.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(names)}")
    if options.against:
        return against(options.against, wanted, quick=options.quick)
    floors: list[Row] = []
    for name in HEADINGS:
        if name not in wanted:
            continue
        print(f"measuring: {name} …", file=sys.stderr, flush=True)
        if not floors and name != "floor":
            floors = importlib.import_module("tests.bench.floor").measure(quick=True, so_far=[])
        watched = Watched(quick=options.quick)
        rows = importlib.import_module(f"tests.bench.{name}").measure(quick=options.quick, so_far=floors)
        floors = rows if name == "floor" else floors
        circumstances = str(watched.circumstances())
        show(circumstances, rows)
        if not options.no_write:
            OUTPUT.write_text(replaced(OUTPUT.read_text(), name, part(circumstances, rows)))
            print(f"written to {OUTPUT}: {HEADINGS[name]}")
    return 0


def against(revision: str, wanted: list[str], *, quick: bool) -> int:
    watched = Watched(quick=quick)
    rows, worse = compare(revision, only=wanted, quick=quick)
    show(str(watched.circumstances()), rows)
    return 1 if worse else 0


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("what", "measured", "against", "aim"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.what, row.value, row.against, row.aim)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
