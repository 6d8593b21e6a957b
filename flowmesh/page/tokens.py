"""The token of the page: whether a request has it, and the cookie of a visitor who has given it."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict

from flowmesh.errors import ConfigError
from flowmesh.settings.secret_files import read_secret

COOKIE = "flowmesh_page"
LASTS_S = 12 * 3600
LEAST_CHARS = 16
TRIES, WINDOW_S = 5, 60.0
"""Wrong tokens from one address in this time; further ones are not compared."""
ALL_TRIES = 100
"""The same, from all addresses together."""
MOST_ADDRESSES = 1000


class Tokens:
    """
    Args:
        file: is read at each use, so that a token can be replaced; None: no token is needed.
    """

    def __init__(self, file: str | None) -> None:
        self._file = file
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    @property
    def needed(self) -> bool:
        return self._file is not None

    def current(self) -> str | None:
        """Raises ConfigError: it cannot be read, or is too short to be safe."""
        if self._file is None:
            return None
        token = read_secret(self._file, "web.token_file")
        if len(token) < LEAST_CHARS:
            raise ConfigError(f"web.token_file: under {LEAST_CHARS} characters; write one with: openssl rand -hex 32")
        return token

    def blocked(self, address: str) -> bool:
        """Whether so many wrong ones came that the next is not compared."""
        since = time.monotonic() - WINDOW_S
        for known in [name for name, times in self._wrong.items() if times[-1] < since]:
            del self._wrong[known]
        recent = [at for at in self._wrong.get(address, ()) if at >= since]
        return len(recent) >= TRIES or sum(map(len, self._wrong.values())) >= ALL_TRIES

    def is_right(self, given: str, address: str) -> bool:
        """Compare in constant time, and count what is wrong. Raises ConfigError as `current`."""
        token = self.current()
        if token is not None and hmac.compare_digest(given.encode(), token.encode()):
            self._wrong.pop(address, None)
            return True
        self._wrong[address] = [*self._wrong.get(address, ())[-TRIES:], time.monotonic()]
        while len(self._wrong) > MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        return False

    def cookie(self) -> str:
        """The value of a new cookie: valid for LASTS_S, and until the token changes."""
        until = str(int(time.time()) + LASTS_S)
        return f"{until}.{self._signed(until)}"

    def is_cookie(self, value: str) -> bool:
        until, _, signature = value.partition(".")
        if not until.isdecimal() or len(until) > 12 or int(until) < time.time():
            return False
        return hmac.compare_digest(signature.encode(), self._signed(until).encode())

    def _signed(self, until: str) -> str:
        return hmac.new((self.current() or "").encode(), f"page {until}".encode(), hashlib.sha256).hexdigest()
