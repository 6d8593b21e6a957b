"""The results of tasks: the paths under which an orchestrator has them, too. A task may have written anything there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flowmesh.messages import wire
from flowmesh.page.sources import Sources
from flowmesh.page.task_view import task_folder, usable
from flowmesh.tasks.history import Entry, Reader

RESULT_FILE = "responses.json"
ARTIFACTS = "artifacts"
CHUNK = 256 * 1024


class Downloads:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def result(self, request: Request) -> Response:
        """`GET /api/v1/results/{task_id}`"""
        entry = self._entry(request)
        fd = None if entry is None else _open(entry, [RESULT_FILE])
        if entry is None or fd is None:
            return _missing("no result")
        ids = {"task_id": entry.task_id, "worker_id": entry.worker_id}
        before = json.dumps(ids)[:-1].encode() + b', "result": '
        return _answer(request, fd, before, b"}", {"content-type": "application/json"})

    def file(self, request: Request) -> Response:
        """`GET /api/v1/results/{task_id}/files/{name}`: an artifact by its name, or a file by its path."""
        parts = request.path_params["name"].split("/")
        if not usable(request.path_params["name"]):
            return _missing("no such file")
        entry = self._entry(request)
        if entry is None:
            return _missing("no such file")
        fd = _open(entry, [ARTIFACTS, *parts])
        fd = _open(entry, parts) if fd is None else fd
        if fd is None:
            return _missing("no such file")
        headers = {
            "content-type": "application/octet-stream",
            "content-disposition": f"attachment; filename*=UTF-8''{quote(parts[-1], safe='')}",
        }
        return _answer(request, fd, b"", b"", headers)

    def _entry(self, request: Request) -> Entry | None:
        """The last attempt that has a folder."""
        task_id = wire.usable_task_id(request.path_params["task_id"])
        if task_id is None:
            return None
        with Reader(self._sources.journal) as reader:
            found = reader.attempts(task_id)
        return next((each.entry for each in found if each.entry.out_dir), None)


def _open(entry: Entry, parts: list[str]) -> int | None:
    """A descriptor of a regular file; None where there is none, or a link is on the way."""
    try:
        with task_folder(entry) as folder:
            return folder.open_file(tuple(parts))
    except (OSError, ValueError):
        return None


def _answer(request: Request, fd: int, before: bytes, after: bytes, headers: dict[str, str]) -> Response:
    size = os.fstat(fd).st_size
    headers["content-length"] = str(len(before) + size + len(after))
    headers["content-security-policy"] = "sandbox; default-src 'none'"
    if request.method == "HEAD":
        os.close(fd)
        return Response(headers=headers)
    return StreamingResponse(_chunks(fd, size, before, after), headers=headers)


def _chunks(fd: int, size: int, before: bytes, after: bytes) -> Iterator[bytes]:
    with os.fdopen(fd, "rb") as file:
        yield before
        while size > 0 and (data := file.read(min(CHUNK, size))):  # it may grow meanwhile
            size -= len(data)
            yield data
        yield after


def _missing(what: str) -> Response:
    return JSONResponse({"error": what}, 404)
