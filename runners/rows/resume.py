"""`spec.resume`: the rows of an earlier attempt, of another task, of a file, or none."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from flowmesh.messages.rows import ROWS_ARCHIVE, ROWS_FILE, Row, read
from runners.api import BadRequest, Context
from runners.data.download import fetch
from runners.data.reading import Refused
from runners.models.files import task_folder
from runners.models.sources import local_path
from runners.models.spec import Headers, Section


class Resume(Section, frozen=True, rename={"task_id": "taskId", "timeout_s": "timeoutSec"}):
    """spec.resume, as a mapping"""

    task_id: str | None = None
    path: str | None = None
    url: str | None = None
    headers: Headers | None = None
    timeout_s: float | None = None


def starts_anew(spec: dict[str, Any]) -> bool:
    """Whether the task drops the rows of its earlier attempts."""
    return spec.get("resume") is False


def check_resume(ctx: Context, spec: dict[str, Any], where: str = "spec") -> Resume | None:
    """`spec.resume` as a mapping; None where it is absent or a boolean.

    Raises:
        BadRequest: the field is wrong.
    """
    given, here = spec.get("resume"), f"{where}.resume"
    if given is None or isinstance(given, bool):
        return None
    wanted = ctx.check(given, Resume, here)
    named = [name for name in ("task_id", "path", "url") if getattr(wanted, name) is not None]
    if len(named) != 1:
        raise BadRequest(f"{here}: give exactly one of `taskId`, `path` and `url`, or true or false")
    for name, value in (("headers", wanted.headers), ("timeoutSec", wanted.timeout_s)):
        if value is not None and wanted.url is None:
            raise BadRequest(f"{here}.{name}: goes with `url`, which is not there")
    return wanted


def read_resume(ctx: Context, spec: dict[str, Any], where: str = "spec") -> Sequence[Row]:
    """The rows that `resume` names; none where it is absent or a boolean.

    Raises:
        BadRequest: there are no such rows, or the field is wrong.
        RunnerError: their server is unreachable.
    """
    wanted, here = check_resume(ctx, spec, where), f"{where}.resume"
    if wanted is None:
        return ()
    if wanted.url is not None:
        field = f"{here}.url"
        path = fetch(ctx, wanted.url, field, headers=wanted.headers, timeout_s=wanted.timeout_s).path
    elif wanted.path is not None:
        field = f"{here}.path"
        path = _in_folder(local_path(ctx, wanted.path, field), field, wanted.path)
    else:
        field = f"{here}.taskId"
        folder = task_folder(ctx, wanted.task_id or "", field)
        if folder is None:
            raise BadRequest(f"{field}: this node has no results of task {wanted.task_id!r}; give their path or url")
        path = _in_folder(folder, field, wanted.task_id or "")
    try:
        with _opened(ctx, path, downloaded=wanted.url is not None) as readable, readable.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            rows = read(cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if packed else file).rows
    except Refused as error:
        raise BadRequest(f"{field}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadRequest(f"{field}: its rows cannot be read: {error}") from None
    if not rows:
        raise BadRequest(f"{field}: holds no rows; give a {ROWS_FILE} or {ROWS_ARCHIVE}, or leave spec.resume out")
    return rows


def _opened(ctx: Context, path: Path, *, downloaded: bool) -> contextlib.AbstractContextManager[Path]:
    return contextlib.nullcontext(path) if downloaded else ctx.reach.opened(path)


def _in_folder(path: Path, where: str, shown: str) -> Path:
    if path.is_dir():
        path = next((path / name for name in (ROWS_FILE, ROWS_ARCHIVE) if (path / name).is_file()), path / ROWS_FILE)
    if not path.is_file():
        raise BadRequest(f"{where}: {shown!r} has no {ROWS_FILE}")
    return path
