"""What was counted since the node started; for `flowmesh status`."""

from __future__ import annotations

from flowmesh.tasks.verdicts import Kind


class Counters:
    def __init__(self) -> None:
        self.malformed = 0
        self.refused = 0
        self.duplicates = 0
        self.verdicts: dict[str, int] = {}

    def add_verdict(self, kind: Kind) -> None:
        self.verdicts[kind.value] = self.verdicts.get(kind.value, 0) + 1
