"""What a pipeline has done, in a folder: one file a stage, each replaced as a whole. One driver at a time uses it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import msgspec

from flowmesh.errors import BusyError, FlowMeshError
from flowmesh.pipelines.parts import Record

STAGES = "stages"
SUMMARY = "responses.json"
TOGETHER = ".together.json"
"""Ends that are kept in one step, while their files are written."""


class Store(Protocol):
    """Keeps the ends of stages."""

    def load(self) -> dict[str, Record]:
        """By stage: its last end."""

    def save(self, *records: Record) -> None:
        """Keep ends: all of them or, if this process dies, none."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep the pipeline's result."""


class FolderStore:
    """A folder of one pipeline, as a context manager.

    Raises:
        BusyError: another process drives this pipeline.
        FlowMeshError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = -1

    def __enter__(self) -> FolderStore:
        try:
            (self.folder / STAGES).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise FlowMeshError(f"{self.folder}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BusyError(f"{self.folder.name}: this pipeline runs already; wait for it, or use another id") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._lock)

    def load(self) -> dict[str, Record]:
        self._finish_together()
        found = {}
        for path in (self.folder / STAGES).glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
            except (OSError, msgspec.DecodeError):
                continue  # of another version, or cut off by a full disk: its stage runs again
            found[record.name] = record
        return found

    def save(self, *records: Record) -> None:
        if len(records) > 1:
            self._write(self.folder / TOGETHER, msgspec.json.encode(records))
            self._finish_together()
            return
        for record in records:
            self._write_end(record)

    def _finish_together(self) -> None:
        """Write the files of ends that are kept in one step; by the next process if this one dies meanwhile."""
        path = self.folder / TOGETHER
        try:
            records = msgspec.json.decode(path.read_bytes(), type=list[Record])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError):
            records = []  # of another version: those stages run again
        for record in records:
            self._write_end(record)
        path.unlink(missing_ok=True)

    def _write_end(self, record: Record) -> None:
        self._write(self.folder / STAGES / f"{record.name}.json", msgspec.json.encode(record))

    def finish(self, summary: dict[str, Any]) -> None:
        self._write(self.folder / SUMMARY, msgspec.json.format(msgspec.json.encode(summary), indent=2))

    def _write(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            raise FlowMeshError(f"{path}: cannot be written: {error.strerror}") from None
