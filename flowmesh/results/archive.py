"""A folder as `<folder>.tar.gz`, in one pass: tar, compressor, checksum, file.

The same content gives the same bytes: sorted, no times, no owners. One top folder inside, named like the folder.
What is no file, folder or link within the folder is an error: an archive that lacks a part is worse than none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from flowmesh.errors import DeliveryError
from flowmesh.results.compress import CHUNK_BYTES, find_pigz, gzipped, tool_env
from flowmesh.results.files import PARTIAL
from flowmesh.results.names import within
from flowmesh.settings_schema import ArchiveSettings


class Member(msgspec.Struct, frozen=True):
    """One entry of the archive. `name` starts with the top folder."""

    name: str
    mode: int
    size: int
    link: str | None = None


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A finished archive."""

    path: str
    size: int
    sha256: str
    content_bytes: int
    notes: tuple[str, ...] = ()


def make_archive(
    folder: Path,
    target: Path,
    settings: ArchiveSettings,
    written: Callable[[int], None] = lambda _: None,
) -> Archive:
    """Pack `folder` into `target`; it appears there when it is whole.

    Args:
        written: told, as it grows, how many compressed bytes there are.

    Raises:
        DeliveryError: what lies in the folder cannot be packed, a tool failed, or the disk is full.
    """
    members = members_of(folder)
    pigz, note = find_pigz(settings)
    tar, tar_note = _find_tar(settings)
    partial = target.with_name(target.name + PARTIAL)
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    digest, size = hashlib.sha256(), 0
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o644), "wb", buffering=0) as file, _tar(tar, folder, members) as stream:
            for chunk in gzipped(stream, settings, pigz):
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
                size += len(chunk)
                written(size)
        partial.replace(target)
    except OSError as error:
        raise DeliveryError(f"{target.name} could not be made: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return Archive(
        path=str(target),
        size=size,
        sha256=digest.hexdigest(),
        content_bytes=sum(member.size for member in members),
        notes=tuple(n for n in (note, tar_note) if n),
    )


def members_of(folder: Path) -> list[Member]:
    """What an archive of `folder` holds, parents first, by name.

    Raises:
        DeliveryError: something in it is neither file nor folder nor a link that stays within.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise DeliveryError(f"{folder.name} is not a folder: it cannot be packed")
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
                raise DeliveryError(f"{name} links to {str(link)!r}, out of the folder; copy the file itself there")
            yield Member(name, 0o777, 0, str(link))
        elif stat.S_ISDIR(status.st_mode):
            yield Member(name, 0o755, 0)
            yield from _below(Path(entry.path), name, top)
        elif stat.S_ISREG(status.st_mode):
            yield Member(name, 0o755 if status.st_mode & 0o111 else 0o644, status.st_size)
        else:
            raise DeliveryError(f"{name} is neither a file nor a folder: it cannot be packed")


# ---- the tar stream --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tar(tar: str | None, folder: Path, members: list[Member]) -> Iterator[IO[bytes] | Iterator[bytes]]:
    """The members as a tar stream: a pipe from the tar program, or without one our own."""
    if tar is None:
        yield _own_tar(folder.parent, members)
        return
    with tempfile.TemporaryFile() as names, tempfile.TemporaryFile() as errors:
        names.write(b"".join(os.fsencode(member.name) + b"\0" for member in members))
        names.seek(0)
        command = [tar, "--create", "--file=-", "--format=gnu", "--no-recursion", "--hard-dereference"]
        command += ["--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]
        command += ["--null", "--files-from=-"]
        process = subprocess.Popen(
            command,
            cwd=folder.parent,
            stdin=names,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=tool_env(),
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            process.stdout.close()
            if process.wait() != 0:
                errors.seek(0)
                said = " ".join(errors.read(2000).decode("utf-8", "replace").split())[:200]
                raise DeliveryError(f"{tar} ended with status {process.returncode} on {folder.name}: {said}")
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.kill()
            process.wait()


def _own_tar(parent: Path, members: list[Member]) -> Iterator[bytes]:
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
            yield from _content(path, member.size)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _content(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        while left:
            data = file.read(min(CHUNK_BYTES, left))
            if not data:
                raise DeliveryError(f"{path.name} became shorter while it was packed")
            left -= len(data)
            yield data
    yield b"\0" * (-size % tarfile.BLOCKSIZE)


def _find_tar(settings: ArchiveSettings) -> tuple[str | None, str]:
    """The tar program where it is GNU's (others lack what makes the archive reproducible)."""
    found = shutil.which(settings.tar_bin)
    if found is None:
        return None, f"{settings.tar_bin} is not installed (archive.tar_bin): packed without it"
    try:
        asked = subprocess.run([found, "--version"], capture_output=True, timeout=10, check=False, env=tool_env())
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{found} does not run ({error}): packed without it"
    if b"GNU tar" not in asked.stdout:
        return None, f"{found} is not GNU tar (archive.tar_bin): packed without it"
    return found, ""
