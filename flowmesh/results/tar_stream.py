"""A folder as a tar stream: GNU tar where it is installed, else Python's own headers.

The same content gives the same bytes: sorted, no times, no owners.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flowmesh.errors import DeliveryError
from flowmesh.files.folder import Folder, open_file
from flowmesh.files.names import shown
from flowmesh.files.walk import Entry
from flowmesh.results.archive_members import members_of
from flowmesh.results.programs import running, tool_env
from flowmesh.results.safe_files import read_exactly

CHUNK_BYTES = 1 << 20
_VERSION_TIMEOUT_S = 10.0


def find_tar(name: str) -> tuple[str | None, str]:
    """The path of GNU tar (no other tar has the options that make the archive reproducible), or None and a note why.

    Args:
        name: the setting `archive.tar_bin`.
    """
    found = shutil.which(name)
    if found is None:
        return None, f"{name} is not installed (archive.tar_bin): the archive was made without it"
    try:
        version = subprocess.run(
            [found, "--version"], capture_output=True, timeout=_VERSION_TIMEOUT_S, check=False, env=tool_env()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{found} does not run ({error}): the archive was made without it"
    if b"GNU tar" not in version.stdout:
        return None, f"{found} is not GNU tar (archive.tar_bin): the archive was made without it"
    return found, ""


@contextlib.contextmanager
def tar_stream(tar: str | None, folder: Folder, beside: int) -> Iterator[IO[bytes] | Iterator[bytes]]:
    """A folder as a tar stream: a pipe from `tar`, or chunks. Read it to its end in the block.

    `tar` opens what it packs by name. So it is used only where tasks have the rights that we have.

    Args:
        tar: the program; None: do without.
        beside: a descriptor of the folder that holds `folder`.

    Raises:
        DeliveryError: as for `members_of`; tar failed, or a file became shorter while it was read.
    """
    if tar is None or folder.owner != os.geteuid():
        yield _chunks(folder)
        return
    with tempfile.TemporaryFile() as names:
        for member, _ in members_of(folder):
            names.write(os.fsencode(member.name) + b"\0")
        names.seek(0)
        command = [tar, "--create", "--file=-", "--format=gnu", "--no-recursion", "--hard-dereference"]
        command += ["--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]
        command += ["--null", "--files-from=-"]
        here = Path(f"/proc/self/fd/{beside}")  # of the child, which has our descriptors until it executes tar
        with running(command, stdin=names, cwd=here, subject=folder.path.name) as process:
            assert process.stdout is not None
            yield process.stdout


def _chunks(folder: Folder) -> Iterator[bytes]:
    for member, entry in members_of(folder):
        info = tarfile.TarInfo(member.name)
        info.mode, info.size = member.mode, member.size
        if member.link is not None:
            info.type, info.linkname = tarfile.SYMTYPE, member.link
        elif entry is None or entry.is_folder:
            info.type = tarfile.DIRTYPE
        if entry is None or not entry.is_file:
            yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        else:
            yield from _file(info, folder, entry)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _file(info: tarfile.TarInfo, folder: Folder, entry: Entry) -> Iterator[bytes]:
    try:
        fd = open_file(entry.folder, entry.name, folder.owner)
    except OSError as error:
        raise DeliveryError(f"{shown(info.name)}: {error.strerror}: it cannot be archived") from error
    with open(fd, "rb", buffering=0):
        info.size = os.fstat(fd).st_size
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        yield from read_exactly(fd, info.size, CHUNK_BYTES, shown(entry.name))
        yield b"\0" * (-info.size % tarfile.BLOCKSIZE)
