"""Whether one part of the bus works. Each reason for a failure is logged once per outage, and so is the recovery."""

from __future__ import annotations

from typing import Any

from loguru import logger
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError

_REFUSALS = (ResponseError, AuthenticationError, AuthorizationError)
_MOST_REASONS = 20
"""Reasons of one outage that are logged."""
_TEXT_SHOWN = 300


class ConnectionHealth:
    """The health of one part of the bus. True while it fails.

    Args:
        failing: what does not work meanwhile, for the log, such as `events are held back`.
        recovered: what is logged when it works again.
        fields: the log line's fields.
    """

    def __init__(self, failing: str, recovered: str, **fields: Any) -> None:
        self.reason = ""
        """Why it fails; empty while it works."""
        self._failing = failing
        self._recovered = recovered
        self._fields = fields
        self._logged: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def failed(self, error: BaseException, **fields: Any) -> None:
        """Record a failure, and log it if its reason is new in this outage."""
        self.reason = describe_redis_error(error)
        if self.reason not in self._logged and len(self._logged) < _MOST_REASONS:
            self._logged.add(self.reason)
            logger.bind(**self._fields, **fields).warning("{}: {}", self._failing, self.reason)

    def works(self) -> None:
        """Record a success."""
        if self.reason:
            logger.bind(**self._fields).info("{}", self._recovered)
        self.reason = ""
        self._logged.clear()


def describe_redis_error(error: BaseException) -> str:
    """Whether Redis is unreachable or refused the command, with its own text; redis-py's copy of the command is cut."""
    text = str(error).rpartition(" of pipeline caused error: ")[2]
    text = " ".join(text.split())[:_TEXT_SHOWN] or type(error).__name__
    return f"Redis {'refused the command' if isinstance(error, _REFUSALS) else 'is unreachable'} ({text})"
