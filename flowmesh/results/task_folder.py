"""One task's folder while it is delivered: its result and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh.results.job import Target
from flowmesh.results.manifest import RESPONSES_FILE, write_manifest
from flowmesh.results.safe_files import to_json, write_in


class TaskFolder:
    """The folder of a task or of a merged child. It is made where it does not exist.

    Raises (from its methods):
        OSError: the folder cannot be made or written.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.task_id = target.task_id
        self.path = Path(target.out_dir)
        self.result: dict[str, Any] = {}
        """The content of responses.json."""

    def write_result(self) -> None:
        write_in(self.path, RESPONSES_FILE, to_json(self.result), make=True)

    def write_manifest(self, sha256_by_path: dict[str, str]) -> None:
        """Write manifest.json.

        Args:
            sha256_by_path: checksums already known, by absolute path.
        """
        known = {Path(path).name: digest for path, digest in sha256_by_path.items() if Path(path).parent == self.path}
        write_manifest(self.path, self.task_id, self.target.artifacts, known)
