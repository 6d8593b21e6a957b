"""Reads the stream of a task's log lines, which its node writes while somebody follows."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from flowmesh.client.requests import Command
from flowmesh.queue import names
from flowmesh.queue.records import fields_of, text

BLOCK_S = 2.0
"""How long one read waits."""
ANSWER_S = 15.0
"""How long a node may take to send the first line, or that there is none."""


class LogReader:
    """Where one reader is in a stream.

    Args:
        key: the stream; None: one of this reader's own, which a node writes when it is asked.
    """

    def __init__(self, key: str | None = None) -> None:
        self.token = secrets.token_hex(8)
        """Names this reader to the node."""
        self.ended = False
        """The node has said that no line follows."""
        self.answered = False
        self._key = names.logs_key(self.token) if key is None else key
        self._after = "0"

    def command(self, *, wait: bool = True) -> Command:
        """The next read.

        Args:
            wait: for lines, where there is none.
        """
        block = ("BLOCK", int(BLOCK_S * 1000)) if wait else ()
        return ("XREAD", *block, "COUNT", 500, "STREAMS", self._key, self._after)

    def take(self, answers: list[Any]) -> Iterator[str]:
        """The lines of an answer."""
        for entry_id, raw in _entries(answers[0]):
            self._after = text(entry_id)
            self.answered = True
            fields = fields_of(raw)
            if "end" in fields:
                self.ended = True
                return
            if "line" in fields:
                yield fields["line"]


def _entries(answer: Any) -> list[Any]:
    """The entries of an answer to XREAD (RESP2)."""
    return list(answer[0][1]) if answer else []
