"""What of a task's result goes to Redis: `responses.json` as the node wrote it, its secrets hidden; or a summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Folder

MAX_BYTES = 1 << 20
"""A larger result is summarised."""
MAX_READ_BYTES = 64 << 20
"""A result above this is not read at all."""
MAX_FIELD_BYTES = 4096
FILE = "responses.json"


def stored_result(out_dir: str) -> bytes:
    """The JSON for Redis; empty where there is no result that can be read. Blocks on the disk."""
    try:
        with Folder.open(Path(out_dir)) as folder, open(folder.open_file((FILE,)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_READ_BYTES:
                return json.dumps(_note(size, out_dir)).encode()
            data = file.read(MAX_READ_BYTES + 1)
    except OSError:
        return b""
    if len(data) <= MAX_BYTES:
        return data
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):
        return b""
    return summary(result, len(data), out_dir)


def summary(result: Any, size: int, out_dir: str) -> bytes:
    """The small fields of a large result; of the others, how many entries they have."""
    kept: dict[str, Any] = {}
    room = MAX_BYTES // 2
    for name, value in result.items() if isinstance(result, dict) else ():
        short, text = value, json.dumps(value, ensure_ascii=False)
        if len(text) > MAX_FIELD_BYTES:
            short = {"omitted": type(value).__name__}
            if isinstance(value, list | dict | str):
                short["length"] = len(value)
            text = json.dumps(short)
        room -= len(text) + len(name)
        if room < 0:
            break
        kept[name] = short
    return json.dumps({**kept, **_note(size, out_dir)}, ensure_ascii=False).encode()


def _note(size: int, out_dir: str) -> dict[str, Any]:
    return {"truncated": True, "size_bytes": size, "path": f"{out_dir}/{FILE}"}
