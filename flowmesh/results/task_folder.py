"""One task's folder while it is delivered: opened once, its result and manifest written, its files read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Folder, Parts
from flowmesh.files.names import shown
from flowmesh.files.removal import Left, remove
from flowmesh.results.job import Target
from flowmesh.results.manifest import MANIFEST_FILE, RESPONSES_FILE, Known, make_manifest
from flowmesh.results.safe_files import to_json, write_in_task


class TaskFolder:
    """The folder of a task or of a merged child. It is made where it does not exist. Close it in the end.

    Raises (from its methods):
        OSError: the folder cannot be made, read or written, or a part of its path is a link.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.task_id = target.task_id
        self.path = Path(target.out_dir)
        self.result: dict[str, Any] = {}
        """The content of responses.json."""
        self._top: Folder | None = None
        self._written: dict[str, tuple[int, Known]] = {}

    @property
    def top(self) -> Folder:
        """Opened by the first use. A folder that gets its path later is not seen."""
        if self._top is None:
            self._top = Folder.open(self.path, make=True)
        return self._top

    def close(self) -> None:
        for fd, _ in self._written.values():
            os.close(fd)
        self._written.clear()
        if self._top is not None:
            self._top.close()
            self._top = None

    def write_result(self) -> None:
        self.write(RESPONSES_FILE, to_json(self.result))

    def write_manifest(self, known: dict[str, Known]) -> None:
        """Write manifest.json.

        Args:
            known: what was sent or archived, by absolute path.
        """
        inside = {
            str(Path(path).relative_to(self.path)): content
            for path, content in known.items()
            if self.path in Path(path).parents
        }
        inside |= {name: content for name, (_, content) in self._written.items()}
        self.write(MANIFEST_FILE, to_json(make_manifest(self.top, self.task_id, self.target.artifacts, inside)))

    def find(self, path: str) -> Parts | None:
        """A path below with its links resolved; None if it leads out of the folder, to itself, or nowhere."""
        try:
            parts = self.top.real(path)
            if parts:
                self.top.status(parts)
        except OSError:
            return None
        return parts or None

    def status(self, parts: Parts) -> os.stat_result | None:
        """Of a file or folder below; None if it is missing."""
        try:
            return self.top.status(parts)
        except OSError:
            return None

    def open_file(self, parts: Parts) -> int:
        """A descriptor to read a file from; of what we wrote ourselves, the file that we wrote.

        Raises:
            OSError: there is none, or it is not the task's.
        """
        written = self._written.get(parts[0]) if len(parts) == 1 else None
        return self.top.open_file(parts) if written is None else os.dup(written[0])

    def remove(self, path: str) -> Left:
        """Remove a file, link or folder below, with all in it; what is left is in the report."""
        above, _, name = path.rpartition("/")
        try:
            parts = self.top.real(above)
            if parts is None or name in {"", ".", ".."}:
                return Left()
            with self.top.below(parts) as folder:
                return remove(folder, name)
        except FileNotFoundError:
            return Left()
        except OSError as error:
            return Left(1, shown(path), error.strerror or str(error))

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the node's own."""
        try:
            fd = write_in_task(self.top.fd, name, data)
        except OSError as error:
            error.filename = str(self.path / name)
            raise
        if (before := self._written.get(name)) is not None:
            os.close(before[0])
        self._written[name] = fd, Known(len(data), hashlib.sha256(data).hexdigest())
