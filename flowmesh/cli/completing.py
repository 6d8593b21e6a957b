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
    """Ids of the node's tasks: those that it has now, and the last that ended; with --redis the deployment's."""
    if ctx.params.get("redis_url"):
        return deployment_ids(ctx, _param, incomplete)
    status = _status(ctx)
    ids = [each["task_id"] for name in ("tasks", "recent") for each in status.get(name) or ()]
    return _matching(ids, incomplete)


def kept_ids(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the tasks in the node's journal: those that run, the last that ended, and older ones that begin so. The
    node may be down."""
    from itertools import islice

    from flowmesh.cli import locate
    from flowmesh.tasks.history import Reader
    from flowmesh.tasks.journal_db import JOURNAL_FILE

    found: list[str] = []
    with contextlib.suppress(Exception):
        where = locate.state_dir(ctx.params.get("state_dir"), ctx.params.get("config"))
        with Reader(where / JOURNAL_FILE) as reader:
            found += [entry.task_id for entry in (*reader.running(), *islice(reader.ended(), MOST))]
            found += reader.matching(incomplete) if incomplete else []
    return _matching(found, incomplete)


def deployment_ids(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the tasks that the deployment's Redis has on record: those that wait or run, and the last that ended."""
    from flowmesh.queue import names

    return _matching(
        [*_asked(ctx, "ZRANGE", names.OPEN, 0, -1), *_asked(ctx, "ZREVRANGE", names.DONE, 0, MOST - 1)], incomplete
    )


def types(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the task types that are known here."""
    from flowmesh.cli import locate
    from flowmesh.tasks.catalogue import known_types

    with contextlib.suppress(Exception):
        return _matching(list(known_types(locate.settings(ctx.params.get("config")))), incomplete)
    return []


def environments(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Environments whose fork servers run."""
    return _matching([each["environment"] for each in _status(ctx).get("servers") or ()], incomplete)


def worker_ids(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the workers that are registered in the deployment's Redis."""
    from flowmesh.messages import wire

    return _matching(_asked(ctx, "SMEMBERS", wire.WORKER_IDS), incomplete)


def examples(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the example tasks."""
    from flowmesh import installed

    return _matching([path.stem for path in (installed.conf() / "tasks").glob("*.yaml")], incomplete)


def _asked(ctx: click.Context, *command: Any) -> list[str]:
    """The answer of the deployment's Redis to a command that reads ids."""
    from flowmesh.cli import locate

    with contextlib.suppress(Exception):
        import redis

        url, _ = locate.deployment_of(ctx.params.get("redis_url"), ctx.params.get("config"))
        with redis.Redis.from_url(url, socket_timeout=WAIT_S, socket_connect_timeout=WAIT_S, retry=None) as client:
            return [found.decode() for found in client.execute_command(*command)]
    return []


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
