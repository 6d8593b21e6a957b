"""What an archive of a folder holds. An archive that lacks a part is worse than none, so nothing is skipped."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.results.safe_names import within


class Member(msgspec.Struct, frozen=True):
    """One entry of the archive. `name` starts with the top folder; `size` is in bytes."""

    name: str
    mode: int
    size: int
    link: str | None = None
    """The target of a symbolic link."""


def members_of(folder: Path) -> list[Member]:
    """What an archive of `folder` holds, parents first, sorted by name.

    Raises:
        DeliveryError: `folder` is no folder, or something in it is neither a file nor a folder nor a symbolic link
            that stays within it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise DeliveryError(f"{folder.name} is not a folder: it cannot be archived")
    return [Member(folder.name, 0o755, 0), *_below(folder, folder.name, folder)]


def _below(folder: Path, prefix: str, top: Path) -> Iterator[Member]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        name = f"{prefix}/{entry.name}"
        status = entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            link = Path(entry.path).readlink()
            if link.is_absolute() or within(Path(entry.path), top) is None:
                raise DeliveryError(f"{name} links to {str(link)!r}, outside of the folder; copy the file into it")
            yield Member(name, 0o777, 0, str(link))
        elif stat.S_ISDIR(status.st_mode):
            yield Member(name, 0o755, 0)
            yield from _below(Path(entry.path), name, top)
        elif stat.S_ISREG(status.st_mode):
            yield Member(name, 0o755 if status.st_mode & 0o111 else 0o644, status.st_size)
        else:
            raise DeliveryError(f"{name} is neither a file nor a folder: it cannot be archived")
