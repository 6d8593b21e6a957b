"""The table of the journal with what waits to be sent to webhooks and trace collectors: one bounded lane a receiver.

Rows outlive a restart. Each has an id, by which its receiver recognises what comes twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from flowmesh.tasks.journal_db import JournalDatabase

MOST = 1000
"""Rows of a lane; the oldest go where more are added."""


class Sending(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be sent."""

    lane: str
    id: str
    """Unique in its lane; a second row of the same id is ignored."""
    body: bytes


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A row that was not sent yet."""

    seq: int
    id: str
    body: bytes
    posted_at: float
    """Seconds since 1970."""
    tries: int


class Sendings:
    """Used from the journal's thread.

    Raises (from its methods):
        JournalError: the journal cannot be read or written.
    """

    def __init__(self, db: JournalDatabase) -> None:
        self._db = db
        self.dropped: dict[str, int] = {}
        """By lane: how many rows were dropped unsent since the start, as too many waited or the disk was full."""

    def add(self, sending: Sending, *, must: bool = False) -> None:
        """Add a row, in the caller's transaction if there is one. Not where the disk is nearly full.

        Args:
            must: also there; for the few that may say that it is.
        """
        if not must and not self._db.has_room():
            self._drop(sending.lane, 1)
            return
        self._db.write(
            "INSERT OR IGNORE INTO sendings (lane, id, posted_at, body) VALUES (?, ?, ?, ?)",
            (sending.lane, sending.id, time.time(), sending.body),
        )
        if (surplus := self.waiting(sending.lane) - MOST) > 0:
            self._db.write(
                "DELETE FROM sendings WHERE seq IN (SELECT seq FROM sendings WHERE lane = ? ORDER BY seq LIMIT ?)",
                (sending.lane, surplus),
            )
            self._drop(sending.lane, surplus)

    def due(self, lane: str, limit: int) -> list[Waiting]:
        """The oldest rows whose time has come."""
        rows = self._db.read(
            "SELECT seq, id, body, posted_at, tries FROM sendings WHERE lane = ? AND due_at <= ? ORDER BY seq LIMIT ?",
            (lane, time.time(), limit),
        )
        return [
            Waiting(seq=seq, id=id_, body=body, posted_at=posted_at, tries=tries)
            for seq, id_, body, posted_at, tries in rows
        ]

    def next_due_s(self, lane: str) -> float | None:
        """How long until a row's time comes; None: there is none."""
        first = self._db.read("SELECT min(due_at) FROM sendings WHERE lane = ?", (lane,))[0][0]
        return None if first is None else max(0.0, float(first) - time.time())

    def sent(self, seqs: Iterable[int]) -> None:
        """These rows have arrived, or are given up."""
        for seq in seqs:
            self._db.write("DELETE FROM sendings WHERE seq = ?", (seq,))

    def later(self, row: Waiting, after_s: float) -> None:
        """This row was refused; the next attempt comes after this time at the earliest."""
        self._db.write(
            "UPDATE sendings SET tries = ?, due_at = ? WHERE seq = ?", (row.tries + 1, time.time() + after_s, row.seq)
        )

    def has(self, lane: str, id_: str) -> bool:
        """Whether this was not sent yet."""
        return bool(self._db.read("SELECT 1 FROM sendings WHERE lane = ? AND id = ?", (lane, id_)))

    def waiting(self, lane: str) -> int:
        """How many rows wait."""
        return int(self._db.read("SELECT count(*) FROM sendings WHERE lane = ?", (lane,))[0][0])

    def keep(self, lanes: Iterable[str]) -> None:
        """Delete the rows of all other lanes: their receivers are no longer in the settings."""
        known = set(lanes)
        for (lane,) in self._db.read("SELECT DISTINCT lane FROM sendings"):
            if lane not in known:
                self._db.write("DELETE FROM sendings WHERE lane = ?", (lane,))

    def _drop(self, lane: str, count: int) -> None:
        self.dropped[lane] = self.dropped.get(lane, 0) + count
