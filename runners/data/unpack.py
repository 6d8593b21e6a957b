"""Unpacks untrusted tar and zip archives: nothing is written outside the target folder, and sizes are bounded."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from flowmesh.files.names import shown
from runners.api import BadRequest, Context
from runners.data.bounded_file import CHUNK_BYTES, BoundedFile, TooMuch, open_tar, tar_format

DEFAULT_MAX_BYTES = 500 * 2**30
DEFAULT_MAX_FILES = 100_000
Format = Literal["tar", "zip"]

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MAX_NAME_BYTES = 2048
"""Of a member's name, and of what a link leads to. Longer ones do not fit into a path together with their folder."""
MAX_DEPTH = 100
"""Folders in each other."""
MAX_HEADER_BYTES = CHUNK_BYTES
"""Of one member of a tar: long names, extended and sparse headers together."""
MIN_DIRECTORY_BYTES = 1 << 20
DIRECTORY_BYTES_A_MEMBER = 256
"""Of a zip's directory: it is in memory as a whole."""
_ENTRY = b"PK\x01\x02"

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, LZMAError, NotImplementedError)
_BY_NAMES = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP})


def is_archive(name: str) -> bool:
    """Whether a file name has the suffix of an archive."""
    return name.lower().endswith(SUFFIXES)


def unpack(ctx: Context, archive: Path, into: Path, archive_format: str, where: str) -> None:
    """Unpack `archive` into the empty folder `into`.

    Args:
        archive_format: one of docs/tasks.md's names, or `auto`: by what the file begins with.

    Raises:
        BadRequest: it is damaged or not such an archive, or a member has an absolute path, `..`, a link that leaves
            the folder, a device or too much in it. Nothing of it must be used then.
        Cancelled: the node asked the task to stop.
    """
    bounds = _Bounds(ctx, where)
    try:
        if archive_format == "zip" or (archive_format == "auto" and zipfile.is_zipfile(archive)):
            _unpack_zip(archive, into, bounds)
        else:
            _unpack_tar(archive, into, tar_format(archive) if archive_format == "auto" else archive_format, bounds)
    except TooMuch as error:
        raise bounds.refusal(str(error)) from error
    except RecursionError as error:
        raise bounds.refusal("too many headers for one member") from error
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno in _BY_NAMES:
            raise bounds.refusal(f"its members' names cannot all exist ({error.strerror})") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, not of the archive
        kind = "tar or zip archive" if archive_format == "auto" else f"{archive_format} archive"
        lines = str(error).splitlines() or [type(error).__name__]
        raise BadRequest(f"{where}: not a sound {kind}: {lines[0]}") from error


class _Bounds:
    """Counts what an archive unpacks to, and refuses too much of it or a path outside of the target."""

    def __init__(self, ctx: Context, where: str) -> None:
        self.ctx = ctx
        self.where = where
        self._max_bytes = int(ctx.job.limits.get("unpack_max_bytes", DEFAULT_MAX_BYTES))
        self.max_files = int(ctx.job.limits.get("unpack_max_files", DEFAULT_MAX_FILES))
        self._bytes = 0
        self._files = 0

    def member(self, name: str) -> PurePosixPath:
        """A member's path below the target; counts it."""
        self.ctx.check_cancelled()
        self._files += 1
        if self._files > self.max_files:
            raise self.refusal(f"more than {self.max_files} members")
        path = PurePosixPath(name.replace("\\", "/"))
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise self.refusal(f"the name of the member {shown(name)!r} is longer than {MAX_NAME_BYTES} bytes")
        if len(path.parts) > MAX_DEPTH:
            raise self.refusal(f"the member {shown(name)!r} lies more than {MAX_DEPTH} folders deep")
        if path.is_absolute() or ".." in path.parts or "\0" in name or (path.parts and path.parts[0].endswith(":")):
            raise self.refusal(f"the member {shown(name)!r} would land outside of its folder")
        return path

    def grow(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._max_bytes:
            raise self.refusal(f"more than {self._max_bytes} bytes unpacked")

    def refusal(self, what: str) -> BadRequest:
        return BadRequest(f"{self.where}: the archive is refused: {what}")

    def copy(self, source: IO[bytes], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:  # x: refuses a second member of one name, or one that goes through a link
            while chunk := source.read(CHUNK_BYTES):
                self.grow(len(chunk))
                self.ctx.progress(self._bytes, None, "bytes")
                out.write(chunk)


def _unpack_tar(archive: Path, into: Path, archive_format: str, bounds: _Bounds) -> None:
    links: list[tuple[Path, str]] = []
    with BoundedFile(open_tar(archive, archive_format), MAX_HEADER_BYTES, "a header") as file:
        file.left_bytes = MAX_HEADER_BYTES
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it has nothing to close
        for member in _members(tar, file):
            path = into / bounds.member(member.name)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                source = tar.extractfile(member)
                assert source is not None, "regular members can be read"
                _create(bounds, source, path, member.name)
            elif member.issym() or member.islnk():
                base = path.parent if member.issym() else into
                _check_link(bounds, into, base, member)
                links.append(
                    (path, member.linkname if member.issym() else os.path.relpath(base / member.linkname, path.parent))
                )
            else:
                raise bounds.refusal(f"the member {shown(member.name)!r} is neither a file, a folder nor a link")
    _make_links(into.resolve(), links, bounds)


def _make_links(root: Path, links: list[tuple[Path, str]], bounds: _Bounds) -> None:
    """Links come last, so that no file is ever written through one, and all of them or none.

    Each is checked before and after it is made, and again at the end: a link with a harmless target can lead outside
    through another link.
    """
    made: list[Path] = []
    try:
        for path, target in links:
            if path.is_symlink() or path.exists():
                raise bounds.refusal(f"the member {shown(path.name)!r} comes twice")
            if path.parent.resolve().is_relative_to(root):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)
                made.append(path)
            _check_landing(bounds, root, path, target)
        for path, target in links:
            _check_landing(bounds, root, path, target)
    except BaseException:
        for path in reversed(made):
            path.unlink()
        raise


def _check_landing(bounds: _Bounds, root: Path, path: Path, target: str) -> None:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise bounds.refusal(f"the link {shown(path.name)!r} leads back to itself") from None
    if not path.resolve().is_relative_to(root):
        raise bounds.refusal(f"the link {shown(path.name)!r} leads out of its folder, to {shown(target)!r}")


def _members(tar: tarfile.TarFile, file: BoundedFile) -> Iterator[tarfile.TarInfo]:
    """All members; what is read between two of them is headers, and bounded."""
    while (member := tar.next()) is not None:
        if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > MAX_HEADER_BYTES:
            raise TooMuch(f"global headers of more than {MAX_HEADER_BYTES} bytes")
        file.left_bytes = None
        yield member
        tar.members = []  # type: ignore[attr-defined]  # otherwise all members stay in memory
        file.left_bytes = MAX_HEADER_BYTES


def _check_link(bounds: _Bounds, into: Path, base: Path, member: tarfile.TarInfo) -> None:
    if len(os.fsencode(member.linkname)) > MAX_NAME_BYTES:
        raise bounds.refusal(f"the link {shown(member.name)!r} leads to more than {MAX_NAME_BYTES} bytes")
    if not member.linkname:
        raise bounds.refusal(f"the link {shown(member.name)!r} leads nowhere")
    target = PurePosixPath(member.linkname)
    landed = Path(base, *target.parts) if not target.is_absolute() else Path(target)
    depth: list[str] = []
    for part in landed.relative_to(into).parts if landed.is_relative_to(into) else [".."]:
        if part == "..":
            if not depth:
                where = f"out of its folder, to {shown(member.linkname)!r}"
                raise bounds.refusal(f"the link {shown(member.name)!r} leads {where}")
            depth.pop()
        else:
            depth.append(part)


class _Directory(BoundedFile):
    """A zip whose directory, which `zipfile` reads at once, is bounded in bytes and members."""

    def __init__(self, archive: Path, most_bytes: int, most_members: int) -> None:
        super().__init__(archive.open("rb"), most_bytes, "a directory")
        self._most_members = most_members

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if len(data) > CHUNK_BYTES and data.count(_ENTRY) > self._most_members:
            raise TooMuch(f"more than {self._most_members} members")
        return data


def _unpack_zip(archive: Path, into: Path, bounds: _Bounds) -> None:
    most_bytes = max(MIN_DIRECTORY_BYTES, bounds.max_files * DIRECTORY_BYTES_A_MEMBER)
    with _Directory(archive, most_bytes, bounds.max_files) as file, zipfile.ZipFile(file) as pack:
        for info in pack.infolist():
            path = into / bounds.member(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 1:
                raise bounds.refusal(f"the member {shown(info.filename)!r} is encrypted")
            if info.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            elif kind not in (0, stat.S_IFREG):
                raise bounds.refusal(f"the member {shown(info.filename)!r} is neither a file nor a folder")
            else:
                with pack.open(info) as source:
                    _create(bounds, source, path, info.filename)


def _create(bounds: _Bounds, source: IO[bytes], path: Path, name: str) -> None:
    try:
        bounds.copy(source, path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise bounds.refusal(f"the member {shown(name)!r} comes twice") from None
