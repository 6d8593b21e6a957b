"""Connections to Redis, with every knob set: nothing waits forever, and a dead peer is found out."""

from __future__ import annotations

import socket
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

__all__ = ["RedisError", "connect", "redis"]

_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


def connect(url: str, *, timeout_s: float, health_check_interval_s: float, name: str) -> redis.Redis:
    """A client of its own pool. It does not retry by itself: its callers know what a retry means.

    Args:
        timeout_s: for connecting and for each answer.
        name: shows in CLIENT LIST.
    """
    options: dict[str, Any] = {}
    if not url.startswith("unix:"):
        options = {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    client: redis.Redis = redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=health_check_interval_s,
        client_name=name,
        max_connections=4,
        protocol=2,  # redis-py's RESP3 renders every published message for its log, which costs more than reading it
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    return client
