"""The `--version` option of both commands. The version is looked up only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from flowmesh import installed


def version_option(program: str) -> Callable[[Any], Any]:
    """A decorator that gives a command `--version`, which prints `PROGRAM VERSION`."""

    def show(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            click.echo(f"{program} {installed.version()}")
            ctx.exit()

    return click.option(
        "--version", is_flag=True, expose_value=False, is_eager=True, callback=show, help="Show the version and exit."
    )
