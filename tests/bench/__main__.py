"""Runs the measurements and prints their table."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.measure import Row

MODULES = (
    "floor",
    "echo",
    "fleet",
    "rest",
    "top",
    "page",
    "exec",
    "isolation",
    "gpus",
    "inference",
    "rows",
    "vllm",
    "training",
    "rag",
    "delivery",
)
OUTPUT = Path("docs/benchmarks.md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"only some of: {', '.join(MODULES)}")
    parser.add_argument("--no-write", action="store_true", help=f"do not write {OUTPUT}")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else MODULES
    rows: list[Row] = []
    for name in MODULES:
        if name in wanted:
            print(f"measuring: {name} …", file=sys.stderr, flush=True)
            rows += importlib.import_module(f"tests.bench.{name}").measure(quick=options.quick, so_far=rows)
    show(rows)
    if not options.no_write:
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(markdown(rows))
        print(f"written to {OUTPUT}")
    return 0


def show(rows: list[Row]) -> None:
    table = Table(title=machine(), title_justify="left")
    for column in ("what", "measured", "against", "aim"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.what, row.value, row.against, row.aim)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def markdown(rows: list[Row]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Measured by `scripts/bench`. Each ratio is against a baseline from the same run. The script replaces this",
        "whole file with the table of its run; what it does not measure again is put back by hand.",
        "",
        machine(),
        "",
        "| what | measured | against | aim |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.what} | {row.value} | {row.against} | {row.aim} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine() -> str:
    load = os.getloadavg()[0]
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    machine = f"{os.cpu_count()} CPUs, {memory:.0f} GiB, Python {platform.python_version()}"
    return f"{day}, {machine}, load at the end {load:.1f}"


if __name__ == "__main__":
    sys.exit(main())
