"""What an archive of a folder holds. An archive that lacks a part is worse than none, so nothing is skipped."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.files.folder import Folder, refusal
from flowmesh.files.names import shown
from flowmesh.files.walk import Entry, Troubles

MAX_PATH_BYTES = 4095
"""No program can unpack a longer path (PATH_MAX)."""
_SHOWN_LINK = 200


class Member(msgspec.Struct, frozen=True):
    """One entry of the archive. `name` starts with the top folder; `size` is in bytes."""

    name: str
    mode: int
    size: int
    link: str | None = None
    """The target of a symbolic link."""


def members_of(folder: Folder) -> Iterator[tuple[Member, Entry | None]]:
    """What an archive of `folder` holds, parents first, sorted by name; with where it is, except for the folder itself.

    Each entry is valid until the next is asked for.

    Raises:
        DeliveryError: something in the folder cannot be looked at, is another user's, or is neither a file nor a folder
            nor a symbolic link that stays within it.
    """
    top = folder.path.name
    yield Member(top, 0o755, 0), None
    troubles = Troubles()
    for entry in folder.entries(troubles, ordered=True):
        _check(top, troubles)
        name = f"{top}/{entry.path}"
        if len(os.fsencode(name)) > MAX_PATH_BYTES:
            raise DeliveryError(f"{shown(name)}: its path is longer than {MAX_PATH_BYTES} bytes: it cannot be archived")
        yield _member(folder, entry, name), entry
    _check(top, troubles)


def _check(top: str, troubles: Troubles) -> None:
    if (first := troubles.first) is not None:
        raise DeliveryError(f"{top}/{first.filename}: {first.strerror}: it cannot be archived")


def _member(folder: Folder, entry: Entry, name: str) -> Member:
    if stat.S_ISLNK(entry.status.st_mode):
        try:
            link = os.readlink(entry.name, dir_fd=entry.folder)
            inside = not link.startswith("/") and folder.real(entry.path) is not None
        except OSError as error:
            raise DeliveryError(f"{shown(name)}: {error.strerror}: it cannot be archived") from error
        if not inside:
            what = f"{shown(name)} links to {link[:_SHOWN_LINK]!r}, outside of the folder"
            raise DeliveryError(f"{what}; copy the file into it")
        return Member(name, 0o777, 0, link)
    if entry.is_folder:
        return Member(name, 0o755, 0)
    if not entry.is_file:
        raise DeliveryError(f"{shown(name)} is neither a file nor a folder: it cannot be archived")
    if why := refusal(entry.status, folder.owner):
        raise DeliveryError(f"{shown(name)}: {why}: it cannot be archived")
    return Member(name, 0o755 if entry.status.st_mode & 0o111 else 0o644, entry.status.st_size)
