"""Connections to Redis with explicit timeouts: nothing waits forever, and a dead peer is detected."""

from __future__ import annotations

import socket
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from flowmesh.bus.login import FileLogin
from flowmesh.messages.sentinel import SentinelAddress, is_sentinel, sentinel_address
from flowmesh.settings.addresses import without_user

__all__ = ["RedisError", "connect", "redis"]

_SPARE_CONNECTIONS = 2
"""For a connection that is closed while its successor is opened."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


def connect(
    url: str,
    *,
    timeout_s: float,
    health_check_interval_s: float,
    name: str,
    users: int = 2,
    password_file: str | None = None,
) -> redis.Redis:
    """A client with its own connection pool. It does not retry: its callers decide that.

    Args:
        url: redis://, rediss://, unix:// or redis+sentinel://.
        timeout_s: to connect, and for each answer.
        name: shown by CLIENT LIST.
        users: how many commands may run at once; redis-py raises for one more instead of queueing it.
        password_file: a file with the password, read for each connection; `url` then contains none.
    """
    reaching: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix:"):
        reaching |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    options: dict[str, Any] = {
        **reaching,
        "health_check_interval": health_check_interval_s,
        "client_name": name,
        "max_connections": users + _SPARE_CONNECTIONS,
        # with RESP3, redis-py formats every published message for its debug log, which costs more than parsing it
        "protocol": 2,
    }
    if is_sentinel(url):
        address = sentinel_address(url)
        login: dict[str, Any] = {"username": address.username, "password": address.password}
        if password_file is not None:
            login = {"credential_provider": FileLogin(password_file, address.username)}
        return _master(address, reaching, login | options)
    if password_file is not None:
        url, username = without_user(url)
        options["credential_provider"] = FileLogin(password_file, username)
    client: redis.Redis = redis.Redis.from_url(url, **options)
    return client


def _master(address: SentinelAddress, reaching: dict[str, Any], options: dict[str, Any]) -> redis.Redis:
    """A client of the service's master: each new connection asks the sentinels for its address."""
    sentinel = Sentinel(address.hosts, sentinel_kwargs=reaching)  # type: ignore[no-untyped-call]
    client: redis.Redis = sentinel.master_for(address.service, db=address.db, **options)
    return client
