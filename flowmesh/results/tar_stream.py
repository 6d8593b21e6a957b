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

from flowmesh.results.archive_members import Member
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
def tar_stream(tar: str | None, folder: Path, members: list[Member]) -> Iterator[IO[bytes] | Iterator[bytes]]:
    """The members as a tar stream: a pipe from `tar`, or chunks where `tar` is None. Read it to its end in the block.

    Raises:
        DeliveryError: tar failed, or a file became shorter while it was read.
    """
    if tar is None:
        yield _chunks(folder.parent, members)
        return
    with tempfile.TemporaryFile() as names:
        names.write(b"".join(os.fsencode(member.name) + b"\0" for member in members))
        names.seek(0)
        command = [tar, "--create", "--file=-", "--format=gnu", "--no-recursion", "--hard-dereference"]
        command += ["--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]
        command += ["--null", "--files-from=-"]
        with running(command, stdin=names, cwd=folder.parent, subject=folder.name) as process:
            assert process.stdout is not None
            yield process.stdout


def _chunks(parent: Path, members: list[Member]) -> Iterator[bytes]:
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.mode, info.size = member.mode, member.size
        path = parent / member.name
        if member.link is not None:
            info.type, info.linkname = tarfile.SYMTYPE, member.link
        elif path.is_dir():
            info.type = tarfile.DIRTYPE
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        if info.type == tarfile.REGTYPE:
            yield from read_exactly(path, member.size, CHUNK_BYTES)
            yield b"\0" * (-member.size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
