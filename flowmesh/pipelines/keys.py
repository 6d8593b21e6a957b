"""The key of a stage: as long as it stays the same, the stage's result can be used again."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from flowmesh.pipelines.references import texts

_LONGEST_PATH = 4096


def key_of(spec: dict[str, Any], runs: Mapping[str, str], *, local_files: bool = True) -> str:
    """The digest of a stage's spec, of the local files that it names, and of the runs it depends on.

    Args:
        spec: with all references replaced.
        runs: by stage that it depends on: the id of the run whose result it uses.
        local_files: False: files are not looked at, since the stage runs on another machine.
    """
    parts = {"spec": spec, "runs": dict(runs), "files": _files(spec) if local_files else {}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _files(spec: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each regular file that a text of the spec names."""
    found = {}
    for _, text in texts(spec):
        if 0 < len(text) < _LONGEST_PATH and "\0" not in text and "\n" not in text:
            try:
                status = os.stat(os.path.expanduser(text))  # noqa: PTH111, PTH116 - a text is hardly ever a path
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(status.st_mode):
                found[text] = (status.st_size, status.st_mtime_ns)
    return found
