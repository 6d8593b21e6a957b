"""Runs Redis scripts: by name, and with their text where Redis does not know them yet, as after its restart."""

from __future__ import annotations

from typing import Any

from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from flowmesh.bus.connection import redis
from flowmesh.queue.lua import Script


async def run_script(client: redis.Redis, script: Script, *arguments: Any) -> Any:
    """Run a script, and return its answer.

    Raises:
        RedisError, OSError, TimeoutError: Redis is unreachable or refused it.
    """
    try:
        return await client.execute_command("EVALSHA", script.sha, 0, *arguments)  # type: ignore[no-untyped-call]
    except NoScriptError:
        return await client.execute_command("EVAL", script.text, 0, *arguments)  # type: ignore[no-untyped-call]


def is_forbidden(error: BaseException) -> bool:
    """Whether this login may never do it, or this server does not have it."""
    if isinstance(error, NoPermissionError):
        return True
    text = str(error).lower()
    return isinstance(error, ResponseError) and ("unknown command" in text or "can't run this command" in text)
