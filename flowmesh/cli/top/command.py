"""`flowmesh top`: a live view of this machine's node, or of a deployment."""

from __future__ import annotations

import shutil
import sys

import click
import msgspec

from flowmesh.cli import locate, render
from flowmesh.cli.top import frame
from flowmesh.cli.top.app import App
from flowmesh.cli.top.feed import Feed, Source
from flowmesh.cli.top.fleet_source import FleetSource
from flowmesh.cli.top.frame import Sort
from flowmesh.cli.top.node_source import NodeSource
from flowmesh.cli.top.painter import Painter
from flowmesh.cli.top.terminal import Terminal
from flowmesh.errors import EXIT_OK

PLAIN_COLUMNS = 400
"""Where output is no terminal: nothing is cut but long errors."""
EVERY_S = 1.0
FLEET_EVERY_S = 2.0


@click.command(
    help="Show GPUs, slots, running and waiting tasks, deliveries and last verdicts, live: of the node on this "
    "machine, or with --redis or --fleet of all nodes of a deployment. Prints once where output is no terminal."
)
@locate.config_option
@locate.state_dir_option
@click.option("--redis", "redis_url", metavar="URL", help="Show the deployment of this Redis.")
@click.option("--fleet", is_flag=True, help="Show the deployment of REDIS_URL, or of --config.")
@click.option("--once", is_flag=True, help="Print one picture and end.")
@click.option(
    "--interval",
    "every_s",
    type=click.FloatRange(min=0.2, max=3600),
    metavar="SECONDS",
    help=f"Time between two pictures; default {EVERY_S:g}, of a deployment {FLEET_EVERY_S:g}.",
)
@click.option("--sort", type=click.Choice([each.value for each in Sort]), default="slot", help="Of running tasks.")
@locate.json_option
def top(
    *,
    config: str | None,
    state_dir: str | None,
    redis_url: str | None,
    fleet: bool,
    once: bool,
    every_s: float | None,
    sort: str,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    source: Source
    if redis_url is not None or fleet:
        source = FleetSource(locate.deployment_of(redis_url, config)[0])
    else:
        source = NodeSource(locate.state_dir(state_dir, config))
    if as_json:
        render.print_json(msgspec.to_builtins(source.fetch()))
        return EXIT_OK
    if once or not render.is_terminal(sys.stdout):
        return _print(source, Sort(sort), asked=once)
    every_s = every_s or (EVERY_S if isinstance(source, NodeSource) else FLEET_EVERY_S)
    painter, terminal = Painter(sys.stdout), Terminal(sys.stdout, sys.stdin)
    feed = Feed(source, every_s, terminal.wake)
    with terminal:
        feed.start()
        try:
            return App(source, feed, terminal, painter, sort=Sort(sort), every_s=every_s).run()
        finally:
            feed.end()


def _print(source: Source, sort: Sort, *, asked: bool) -> int:
    """Print one picture, as long as it is."""
    picture = frame.ordered(source.fetch(), sort)
    width = shutil.get_terminal_size((PLAIN_COLUMNS, 24)).columns if sys.stdout.isatty() else PLAIN_COLUMNS
    Painter(sys.stdout).print([*frame.header(picture, width), *frame.body(picture, width, None)])
    if not asked and sys.stdout.isatty():
        print(
            "TERM is dumb or not set: no live view. `watch flowmesh top --once` shows it again and again",
            file=sys.stderr,
        )
    return EXIT_OK
