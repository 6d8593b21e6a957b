"""Writes how far a run is beside its checkpoints, for the next attempt and for the event of a failed one."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from flowmesh.messages import steps
from flowmesh.messages.steps import STEPS_FILE, Steps


class StepNotes:
    """The steps of this attempt, and what earlier ones did in vain.

    Raises (from its methods):
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the task's checkpoints.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(folder / STEPS_FILE, flags, 0o644)
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            self._before = steps.read(file)
        self._now = Steps(done=0, total=0)
        self.lost: int | None = None
        """Steps that earlier attempts did in vain; None: there was none."""

    def begin(self, step: int, total: int) -> None:
        """The attempt goes on from `step`."""
        before = self._before
        if before is not None:
            self.lost = before.lost + max(0, before.done - step)
        self._write(Steps(done=step, total=total, checkpointed=step, lost=self.lost or 0))

    def advance(self, step: int) -> None:
        """`step` is done."""
        self._write(msgspec.structs.replace(self._now, done=step))

    def saved(self, step: int) -> None:
        """A whole checkpoint of `step` is on disk."""
        self._write(msgspec.structs.replace(self._now, checkpointed=step))

    def _write(self, now: Steps) -> None:
        self._now = now
        steps.write(self._fd, now)
