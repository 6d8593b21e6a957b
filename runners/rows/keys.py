"""The key of a row: a digest of everything that determines it, and nothing of how it is computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmesh.messages.rows import digest

WHOLE_BYTES = 64 * 1024**2
"""Files up to this size are hashed whole; of larger ones, blocks all over the file."""
BLOCK_BYTES = 64 * 1024
BLOCKS = 256
_HUB = "snapshots"
_UNUSED = (".md", ".gitattributes", ".gitignore", ".lock")


def key_of(*parts: Any) -> str:
    """The digest of some values, which msgspec can encode; the order of a mapping's keys does not matter."""
    return digest(parts)


def folder_digest(folder: Path) -> str:
    """Identity of a model's or adapter's folder: the commit of a hub snapshot, else a digest of its files.

    Of a file over 64 MiB, 256 blocks of 64 KiB are hashed and its size; a training run changes all of a file.
    """
    if folder.parent.name == _HUB:
        return f"{folder.parent.parent.name}@{folder.name}"
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if path.is_file() and not name.endswith(_UNUSED) and not name.startswith("."):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            for block in _blocks(path):
                digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= WHOLE_BYTES:
            while data := file.read(1 << 20):
                yield data
            return
        for number in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
            yield file.read(BLOCK_BYTES)
