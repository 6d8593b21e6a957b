"""What one part of the bus cannot do, and why: told once for each reason, and once when it is over."""

from __future__ import annotations

from typing import Any

from loguru import logger
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError

_REFUSALS = (ResponseError, AuthenticationError, AuthorizationError)
_MOST = 20
"""Reasons of one outage that are told."""


class Trouble:
    """
    Args:
        what: what does not happen meanwhile, such as `events wait`.
        over: what is said then.
    """

    def __init__(self, what: str, over: str, **facts: Any) -> None:
        self.reason = ""
        """Empty while all is well."""
        self._what = what
        self._over = over
        self._facts = facts
        self._told: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.reason)

    def met(self, error: BaseException, **facts: Any) -> None:
        """It failed, perhaps once more."""
        self.reason = in_words(error)
        if self.reason not in self._told and len(self._told) < _MOST:
            self._told.add(self.reason)
            logger.bind(**self._facts, **facts).warning("{}: {}", self._what, self.reason)

    def over(self) -> None:
        """It works."""
        if self.reason:
            logger.bind(**self._facts).info("{}", self._over)
        self.reason = ""
        self._told.clear()


def in_words(error: BaseException) -> str:
    """Whether Redis is away or there and refusing, with its own words; redis-py's quote of the command left out."""
    said = str(error).rpartition(" of pipeline caused error: ")[2]
    said = " ".join(said.split())[:300] or type(error).__name__
    return f"Redis {'refuses' if isinstance(error, _REFUSALS) else 'is away'} ({said})"
