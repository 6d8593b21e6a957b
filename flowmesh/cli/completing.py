"""What the shell completes beyond commands and options: ids of tasks and workers, from the node or from Redis.

Quick and silent: where nothing answers within WAIT_S, nothing is completed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

WAIT_S = 0.5
MOST = 200


def task_ids(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the node's tasks: those that it has now, and the last that ended."""
    status = _status(ctx)
    ids = [each["task_id"] for name in ("tasks", "recent") for each in status.get(name) or ()]
    return _matching(ids, incomplete)


def environments(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Environments whose fork servers run."""
    return _matching([each["environment"] for each in _status(ctx).get("servers") or ()], incomplete)


def worker_ids(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the workers that are registered in the deployment's Redis."""
    from flowmesh.cli import locate
    from flowmesh.messages import wire

    with contextlib.suppress(Exception):
        import redis

        url, _ = locate.deployment_of(ctx.params.get("redis_url"), ctx.params.get("config"))
        with redis.Redis.from_url(url, socket_timeout=WAIT_S, socket_connect_timeout=WAIT_S, retry=None) as client:
            return _matching([found.decode() for found in client.smembers(wire.WORKER_IDS)], incomplete)
    return []


def examples(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the example tasks."""
    from flowmesh import installed

    return _matching([path.stem for path in (installed.conf() / "tasks").glob("*.yaml")], incomplete)


def _status(ctx: click.Context) -> dict[str, Any]:
    from flowmesh.cli import locate
    from flowmesh.cli.control import Control

    with contextlib.suppress(Exception):
        where = locate.state_dir(ctx.params.get("state_dir"), ctx.params.get("config"))
        with Control(where) as control:
            return control.status_json(MOST, timeout_s=WAIT_S)
    return {}


def _matching(words: list[str], incomplete: str) -> list[str]:
    return sorted({word for word in words if word.startswith(incomplete)})
