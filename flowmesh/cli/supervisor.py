"""`flowmesh-supervisor`: the command line that starts a node."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowmesh.cli.guard import guarded, piped
from flowmesh.cli.version import version_option

if TYPE_CHECKING:
    from flowmesh.settings.load import Loaded
    from flowmesh.settings.schema import Settings

_NAMED = {
    "redis_url": "redis.url",
    "results_dir": "results.dir",
    "worker_id": "node.worker_id",
    "state_dir": "node.state_dir",
    "log_level": "node.log_level",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", type=click.Path(dir_okay=False), metavar="FILE", help="The node's settings (conf/node.toml).")
@click.option("--check", is_flag=True, help="Check the settings, print each value and its origin, and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --check: print one JSON object.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a setting; may be repeated.")
@click.option("--redis-url", metavar="URL", help="Same as --set redis.url=URL.")
@click.option("--results-dir", metavar="DIR", help="Same as --set results.dir=DIR.")
@click.option("--worker-id", metavar="ID", help="Same as --set node.worker_id=ID.")
@click.option("--state-dir", metavar="DIR", help="Same as --set node.state_dir=DIR.")
@click.option("--log-level", metavar="LEVEL", help="Same as --set node.log_level=LEVEL.")
@version_option("flowmesh-supervisor")
def command(config: str | None, check: bool, as_json: bool, sets: tuple[str, ...], **named: str | None) -> int:
    """Run a FlowMesh node: accept tasks from Redis, and run each in a separate process tree.

    SIGTERM drains the node: running tasks finish, or save a checkpoint (node.on_sigterm), then it exits. SIGINT after
    it stops them. SIGHUP reloads the settings and SIGUSR2 restarts the program in its installed version; running tasks
    continue in both cases.
    """
    import os

    from flowmesh.settings.load import load
    from flowmesh.startup import secret_environ

    environment = secret_environ.take(os.environ)  # first: from here on nobody else reads the secrets
    overrides = {key: value for name, key in _NAMED.items() if (value := named[name]) is not None}
    for assignment in sets:
        key, sep, value = assignment.partition("=")
        if not sep:
            raise click.UsageError("--set: expected KEY=VALUE, such as redis.timeout_s=10")
        overrides[key.strip()] = value
    path = Path(config) if config else None
    if check:
        import flowmesh.supervisor  # noqa: F401 - a version that cannot be imported must not pass its check
        from flowmesh.cli.check import report

        return piped(lambda: report(load(path, environment, overrides), as_json=as_json))
    return _serve(lambda: load(path, environment, overrides), environment)


def _serve(read: Callable[[], Loaded], environment: dict[str, str]) -> int:
    import asyncio

    from flowmesh.cli.logs_setup import configure
    from flowmesh.processes import linux
    from flowmesh.settings.load import secrets
    from flowmesh.startup import preflight
    from flowmesh.supervisor import Supervisor

    def usable() -> Settings:
        settings = read().settings
        preflight.check(settings, environment)
        return settings

    linux.limit_malloc()
    settings = usable()
    hides = secrets(settings)
    configure(settings, hides)

    async def live() -> int:
        return await Supervisor(settings, environment, usable, hides).run()

    return asyncio.run(live())


def main() -> int:
    """The entry point; returns one of the exit codes in flowmesh.errors."""
    return guarded(lambda: command.main(standalone_mode=False), "flowmesh-supervisor")


if __name__ == "__main__":
    sys.exit(main())
