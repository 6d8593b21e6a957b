"""Who answers for a child of a fork server."""

from __future__ import annotations

from typing import Protocol

from flowmesh.messages.job import Exit
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import Forked


class ChildOwner(Protocol):
    """Who answers for a child. Called on the loop, in the order in which things happened."""

    def on_forked(self, forked: Forked, pipe: Pipe) -> None:
        """The child exists; the owner gets the node's end of its pipe. Also called for adopted children."""

    def on_fork_failed(self, attempt: int, message: str, own: bool, /) -> None:
        """There will be no child; the fork server says why. Own: the reason lies in the request."""

    def on_gone(self, attempt: int, exit_: Exit) -> None:
        """The child and its whole tree have ended. To be answered with `forget` once that is in the journal."""

    def on_lost(self, attempt: int, message: str) -> None:
        """The child was killed with its fork server; its exit status is unknown."""
