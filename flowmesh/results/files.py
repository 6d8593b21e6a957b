"""Small files written whole or not at all, and JSON in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

PARTIAL = ".partial"
_MODE = 0o644
_PRIVATE = 0o600


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, whatever is killed in between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    # O_EXCL with O_NOFOLLOW: what a task may have left under that name is not written through
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    try:
        with open(os.open(partial, flags, _PRIVATE if private else _MODE), "wb") as file:
            file.write(data)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def below(folder: Path | str, *, strict: bool = False) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder that is no folder itself; links are not followed.

    Args:
        strict: a folder that cannot be read is not passed over.

    Raises:
        OSError: that was wanted, and there is one.
    """
    open_ = [os.fspath(folder)]
    while open_:
        try:
            with os.scandir(open_.pop()) as entries:
                found = list(entries)
        except OSError:
            if strict:
                raise
            continue
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                open_.append(entry.path)
            else:
                yield entry


def to_json(value: Any) -> bytes:
    """Indented JSON with a line's end. What is not finite is null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
