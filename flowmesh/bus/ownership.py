"""Tells a node from its copy: a random token in the registration, renewed all the time by whoever has it.

Two copies of one running machine (a snapshot that was resumed twice) agree in everything that a file or the memory
holds. They differ in the tokens that they draw afterwards: who finds a token that it never wrote is the second.
"""

from __future__ import annotations

import secrets
from collections import deque

REMEMBERED = 2000
"""Tokens. A Redis that fell back to older data, as after a failover, may show an earlier one of ours."""


class Ownership:
    """The tokens that this process wrote, or tried to write; a copy of the process has a copy of them."""

    def __init__(self) -> None:
        self._written: deque[bytes] = deque(maxlen=REMEMBERED)
        self.began = False
        """Whether one of them is known to be in Redis. Before that, there may be one of a process before us."""

    def draw(self) -> str:
        """The next token. It counts as ours from now on: an answer may be lost after Redis has taken it."""
        token = secrets.token_hex(8)
        self._written.append(token.encode())
        return token

    def is_ours(self, token: bytes | None) -> bool:
        """Whether the token that Redis has is no copy's."""
        return token is None or not self.began or token in self._written
