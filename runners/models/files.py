"""Folders of weights from a path, another task's results or a URL. Archives are unpacked."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

from flowmesh.validation.s3_url import is_s3
from runners.api import BadRequest, Context, Later
from runners.data.download import fetch
from runners.data.reading import Refused
from runners.data.unpack import is_archive, unpack
from runners.models.sources import local_path

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
DEPTH = 4
"""Levels of subfolders that are searched for a model."""


def task_folder(ctx: Context, task_id: str, where: str) -> Path | None:
    """The results of another task of this node, or None.

    Raises:
        BadRequest: `task_id` is invalid, or a link that leads outside lies there.
    """
    if not SAFE_ID.fullmatch(task_id):
        raise BadRequest(f"{where}: invalid task id {task_id!r}")
    try:
        folder = ctx.reach.find(ctx.results_dir / task_id)
    except Refused as error:
        raise BadRequest(f"{where}: the folder of task {task_id!r} {error}") from None
    return folder if folder is not None and folder.is_dir() else None


def existing(ctx: Context, text: str, where: str, *, others: bool) -> Path | None:
    """A document's path if something is there, else None.

    Args:
        others: the document names other places, too. Then a path that it may not read is passed over, with a warning.

    Raises:
        BadRequest: it leads outside of what documents may read, and there is no other place.
    """
    try:
        path = local_path(ctx, text, where)
    except BadRequest as error:
        if not others:
            raise
        ctx.log.warning("%s", error)
        return None
    return path if path.exists() else None


def result_url(ctx: Context, task_id: str, name: str) -> str | None:
    """URL of another task's file where this task's own files go; None without HTTP delivery."""
    own = f"/{ctx.task_id}/files/"
    if ctx.job.file_url is not None and is_s3(ctx.job.file_url):
        beside = ctx.job.file_url.removesuffix(f"/{ctx.task_id}/{{name}}")
        return f"{beside}/{task_id}/{name}"
    if ctx.job.file_url is None or own not in ctx.job.file_url:
        return None
    return ctx.job.file_url.replace(own, f"/{task_id}/files/").replace("{name}", quote(name))


def safe_name(name: str, where: str) -> str:
    """`name`, which must be a file name without a path.

    Raises:
        BadRequest: it is not.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BadRequest(f"{where}: {name!r} is not a plain file name")
    return name


def opened(ctx: Context, path: Path, archive_format: str, where: str) -> Path:
    """A folder unchanged; an archive unpacked into this attempt's TMPDIR.

    Raises:
        BadRequest: `path` is neither.
        Later: see `Context.unpacks`.
    """
    if path.is_dir():
        return path
    if archive_format == "none" or (archive_format == "auto" and not is_archive(path.name)):
        raise BadRequest(f"{where}: {str(path)!r} is a file and no archive; give a folder, or set archive_format")
    if not ctx.unpacks:
        raise Later(f"{where}: unpacked by the task", path)
    target = Path(tempfile.mkdtemp(prefix="unpacked-", dir=ctx.tmp_dir))
    try:
        with ctx.reach.opened(path) as judged:
            unpack(ctx, judged, target, archive_format, where)
    except Refused as error:
        raise BadRequest(f"{where}: {str(path)!r} {error}") from None
    return target


def downloaded(
    ctx: Context,
    url: str,
    archive_format: str,
    where: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Path:
    """Download an archive and unpack it, once for all tasks of the node.

    Raises:
        BadRequest: the server refuses it, or it is not an archive.
        RunnerError: the server is unreachable.
    """
    if is_s3(url) and (archive_format == "none" or (archive_format == "auto" and not is_archive(url))):
        return opened(ctx, local_path(ctx, url, where), archive_format, where)
    if archive_format == "none":
        raise BadRequest(f"{where}: a URL has to be an archive, so archive_format cannot be 'none'")
    file = fetch(ctx, url, where, headers=headers, timeout_s=timeout_s)
    ctx.log.info("downloaded %s bytes=%d", Path(urlsplit(url).path).name, file.path.stat().st_size)
    suffix = archive_format.replace(".", "-")
    return file.derived(f"unpacked-{suffix}", lambda target: unpack(ctx, file.path, target, archive_format, where))


def find_root(folder: Path, marker: str, what: str, where: str) -> Path:
    """The uppermost folder in `folder` that contains the file `marker`.

    Raises:
        BadRequest: none contains it, or several at the same depth.
    """
    for level in _levels(folder):
        found = [each for each in level if (each / marker).is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(each.relative_to(folder)) for each in sorted(found)[:8])
            raise BadRequest(f"{where}: several folders with {marker}: {names}; name one of them")
    raise BadRequest(f"{where}: no {what} there: no folder in it has a {marker}")


def _levels(folder: Path) -> Iterator[list[Path]]:
    level = [folder]
    for _ in range(DEPTH + 1):
        yield level
        level = [each for parent in level for each in parent.iterdir() if each.is_dir() and not each.is_symlink()]
