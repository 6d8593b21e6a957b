"""A real HTTP server on 127.0.0.1 with files, ranges, ETags, and the ways in which servers let their clients down."""

from __future__ import annotations

import dataclasses
import email.utils
import re

from tests.kit.fake_http import FakeHandler, FakeServer


@dataclasses.dataclass
class Served:
    """One file, and how the server misbehaves with it."""

    body: bytes
    etag: str | None = '"1"'
    modified: bool = False
    """Whether it sends Last-Modified."""
    ranges: bool = True
    cut_after: list[int] = dataclasses.field(default_factory=list)
    """For each of the next answers, how many bytes come before the connection breaks."""
    statuses: list[int] = dataclasses.field(default_factory=list)
    """For each of the next requests, what is answered in place of the file."""
    token: str | None = None
    """The Authorization header that it wants."""
    encoding: str | None = None
    """The Content-Encoding that it claims."""
    length: int | None = None
    """The Content-Length that it claims, if it is not the true one; the connection is closed behind the body."""


class Server(FakeServer):
    def __init__(self) -> None:
        super().__init__(_Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, dict[str, str], int]] = []
        """(path, headers in lower case, answered status)."""

    def url(self, path: str) -> str:
        return f"{self.origin}/{path}"


class _Handler(FakeHandler):
    server: Server

    def do_GET(self) -> None:
        headers = self.lower_headers()
        served = self.server.files.get(self.path.split("?")[0].lstrip("/"))
        status, start = self._decide(served, headers)
        self.server.requests.append((self.path, headers, status))
        if served is None or status not in (200, 206):
            self._send(status, b"", served)
            return
        self._send(status, served.body[start:], served, start)

    def _decide(self, served: Served | None, headers: dict[str, str]) -> tuple[int, int]:
        if served is None:
            return 404, 0
        if served.statuses:
            return served.statuses.pop(0), 0
        if served.token is not None and headers.get("authorization") != served.token:
            return 401, 0
        if served.etag is not None and headers.get("if-none-match") == served.etag:
            return 304, 0
        stamp = email.utils.formatdate(0, usegmt=True)
        if served.modified and headers.get("if-modified-since") == stamp:
            return 304, 0
        match = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        fresh = headers.get("if-range") in (served.etag, stamp if served.modified else None)
        if match and served.ranges and fresh:
            return (206 if int(match[1]) < len(served.body) else 416), int(match[1])
        return 200, 0

    def _send(self, status: int, body: bytes, served: Served | None, start: int = 0) -> None:
        headers = {}
        if served is not None and served.etag is not None:
            headers["ETag"] = served.etag
        if served is not None and served.modified:
            headers["Last-Modified"] = email.utils.formatdate(0, usegmt=True)
        if status == 206 and served is not None:
            whole = len(served.body)
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        if status == 416 and served is not None:
            headers["Content-Range"] = f"bytes */{len(served.body)}"
        if served is not None and served.encoding is not None:
            headers["Content-Encoding"] = served.encoding
        claimed = served.length if served is not None and body else None
        if status != 304:
            headers["Content-Length"] = str(len(body) if claimed is None else claimed)
        self.begin(status, headers)
        self.close_connection = self.close_connection or claimed is not None
        cut = served.cut_after.pop(0) if served is not None and body and served.cut_after else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
