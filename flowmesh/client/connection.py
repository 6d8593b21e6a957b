"""Connections of clients to a deployment's Redis."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flowmesh.errors import ConfigError, UnavailableError
from flowmesh.messages.sentinel import is_sentinel, sentinel_address
from flowmesh.redaction import redact_url
from flowmesh.settings import addresses
from flowmesh.settings.secret_files import read_secret

if TYPE_CHECKING:
    import redis
    import redis.asyncio

TIMEOUT_S = 10.0


def address(url: str | None) -> str:
    """`url`, else `REDIS_URL` with the password in the file that `REDIS_PASSWORD_FILE` names.

    Raises:
        ConfigError: there is no address, or the file cannot be read.
    """
    if url:
        return url
    found = os.environ.get("REDIS_URL")
    if not found:
        raise ConfigError("no Redis address: give Client(url), or set REDIS_URL")
    file = os.environ.get("REDIS_PASSWORD_FILE")
    return addresses.with_password(found, read_secret(file, "REDIS_PASSWORD_FILE")) if file else found


def open_client(url: str, *, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A client that retries a command twice. Connects at its first command.

    Args:
        url: redis://, rediss://, unix:// or redis+sentinel://.
        timeout_s: to connect, and for each answer.

    Raises:
        ConfigError: the address cannot be used.
    """
    import redis
    from redis.backoff import ExponentialWithJitterBackoff
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    options = _options(timeout_s, Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), 2))
    try:
        return _master(Sentinel, url, options) if is_sentinel(url) else redis.Redis.from_url(url, **options)
    except (ValueError, redis.RedisError) as error:
        raise ConfigError(f"the Redis URL {redact_url(url)!r} cannot be used: {error}") from None


def open_async_client(url: str, *, timeout_s: float = TIMEOUT_S) -> redis.asyncio.Redis:
    """The same for asyncio.

    Raises:
        ConfigError: the address cannot be used.
    """
    import redis.asyncio
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel
    from redis.backoff import ExponentialWithJitterBackoff

    options = _options(timeout_s, Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), 2))
    try:
        return _master(Sentinel, url, options) if is_sentinel(url) else redis.asyncio.Redis.from_url(url, **options)
    except (ValueError, redis.RedisError) as error:
        raise ConfigError(f"the Redis URL {redact_url(url)!r} cannot be used: {error}") from None


def _options(timeout_s: float, retry: Any) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "retry": retry, "health_check_interval": 15, "protocol": 2}


def _master(sentinel: Any, url: str, options: dict[str, Any]) -> Any:
    """A client of the master that the sentinels report."""
    where = sentinel_address(url)
    login = {"username": where.username, "password": where.password}
    found = sentinel(where.hosts, sentinel_kwargs={"socket_timeout": options["socket_timeout"]})
    return found.master_for(where.service, db=where.db, **login, **options)


def unavailable(url: str, error: Exception) -> UnavailableError:
    """The error of a Redis that does not answer, or refuses the login or a command."""
    import redis

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, redis.AuthenticationError):
        return UnavailableError(
            f"Redis at {redact_url(url)} refused the login: {text}; check user name and password in the address"
        )
    if isinstance(error, redis.ResponseError):
        return UnavailableError(f"Redis at {redact_url(url)} refused a command: {text[:300]}")
    return UnavailableError(f"Redis at {redact_url(url)} does not answer: {text}")
