"""`flowmesh-supervisor`: the node's own command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowmesh import __version__
from flowmesh.errors import EXIT_OK, FlowMeshError

if TYPE_CHECKING:
    from flowmesh.settings_load import Loaded
    from flowmesh.settings_schema import Settings

_NAMED = {
    "redis_url": "redis.url",
    "results_dir": "results.dir",
    "worker_id": "node.worker_id",
    "state_dir": "node.state_dir",
    "log_level": "node.log_level",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(dir_okay=False), metavar="FILE", help="The node's settings (conf/node.toml).")
@click.option("--check", is_flag=True, help="Check the settings, say what each is and where it comes from, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --check: one JSON object.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any setting, such as redis.url=unix:///run/r.")
@click.option("--redis-url", metavar="URL", help="Same as --set redis.url=URL.")
@click.option("--results-dir", metavar="DIR", help="Same as --set results.dir=DIR.")
@click.option("--worker-id", metavar="ID", help="Same as --set node.worker_id=ID.")
@click.option("--state-dir", metavar="DIR", help="Same as --set node.state_dir=DIR.")
@click.option("--log-level", metavar="LEVEL", help="Same as --set node.log_level=LEVEL.")
@click.version_option(__version__, prog_name="flowmesh-supervisor", message="%(prog)s %(version)s")
def command(config: str | None, check: bool, as_json: bool, sets: tuple[str, ...], **named: str | None) -> int:
    """Run a FlowMesh node: take tasks from Redis, each in a process tree of its own.

    SIGTERM drains (running tasks finish), a second one stops them. SIGHUP takes new settings and SIGUSR2 a new version,
    both while the tasks run on.
    """
    import os

    from flowmesh.settings_load import load

    overrides = {key: value for name, key in _NAMED.items() if (value := named[name]) is not None}
    for each in sets:
        key, sep, value = each.partition("=")
        if not sep:
            raise click.UsageError("--set: expected KEY=VALUE")
        overrides[key.strip()] = value
    path = Path(config) if config else None
    if check:
        from flowmesh.cli.check import report

        return report(load(path, os.environ, overrides), as_json=as_json)
    return _serve(lambda: load(path, os.environ, overrides))


def _serve(read: Callable[[], Loaded]) -> int:
    import asyncio
    import os

    from flowmesh.cli.logs_setup import configure
    from flowmesh.execution import preflight
    from flowmesh.supervisor import Supervisor

    environment = dict(os.environ)

    def usable() -> Settings:
        settings = read().settings
        preflight.check(settings, environment)
        return settings

    settings = usable()
    configure(settings)

    async def live() -> int:
        return await Supervisor(settings, environment, usable).run()

    return asyncio.run(live())


def main() -> int:
    try:
        return command.main(standalone_mode=False) or EXIT_OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except FlowMeshError as error:
        print(f"flowmesh-supervisor: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
