"""Fetches from the orchestrator and S3 on behalf of tasks, with the node's credentials, which no task sees.

A child of the node that answers GET and HEAD requests on a unix socket, and asks the orchestrator's origin the same.
It follows no redirect: a task follows them itself, without the token. Of S3 it reads what `cloud.read` allows. A task
proves itself with the key in its job.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import logging
import os
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import msgspec

from flowmesh.errors import ConfigError
from flowmesh.messages.cloud import Keys
from flowmesh.messages.gateway import ERROR, KEY, NO_S3, NO_TOKEN, S3, S3_FAULT, S3_LIST, TIMEOUT
from flowmesh.processes.pipe import Pipe
from flowmesh.results.child import credentials_of
from flowmesh.results.gateway_note import NOTE_FILE, Note
from flowmesh.results.http_errors import describe_failure, innermost
from flowmesh.results.s3_client import S3Error
from flowmesh.results.s3_reader import S3Reader
from flowmesh.results.safe_files import read_note
from flowmesh.settings.secret_files import read_token
from flowmesh.validation.s3_url import PREFIX, parse
from flowmesh.web.origins import shown_origin, without_login
from flowmesh.web.session import make_session, options_for

if TYPE_CHECKING:
    import requests

CHUNK_BYTES = 256 * 1024
MAX_TIMEOUT_S = 600.0
IDLE_S = 60.0
"""A connection without a request is closed after this time."""
MAX_LISTED = 1_000_000
"""Objects in one list of S3, whatever a task asks for."""
_PASSED = ("Range", "If-Range", "If-None-Match", "If-Modified-Since", "Accept", "Accept-Encoding")
_NOT_RETURNED = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "upgrade", "trailer", "te", "set-cookie", "proxy-authenticate")
)

_ANSWERS = frozenset((304, 403, 404, 412, 416))
"""Statuses of S3 that a task gets as they are."""

log = logging.getLogger("flowmesh.delivery")


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, note: Note, token: str | None, keys: Keys | None = None) -> None:
        self.note = note
        self.origin = "" if note.orchestrator_url is None else shown_origin(without_login(note.orchestrator_url))
        self.s3 = None if note.s3 is None else S3Reader(note.s3, keys)
        self._token = token
        with contextlib.suppress(FileNotFoundError):
            Path(note.socket).unlink()
        super().__init__(note.socket, Handler)
        Path(note.socket).chmod(note.mode)
        self._made = Path(note.socket).stat().st_ino

    def token(self) -> str | None:
        """The token as it is now; None where it cannot be read."""
        if self.note.token_file is None:
            return self._token
        try:
            return read_token(self.note.token_file)
        except ConfigError as error:
            log.warning("%s", error)
            return None

    def service_actions(self) -> None:
        """End where the socket was removed or replaced: the node then starts another gateway."""
        try:
            there = Path(self.note.socket).stat().st_ino
        except OSError:
            there = -1
        if there != self._made:
            log.warning("the socket is gone")
            threading.Thread(target=self.shutdown, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.exception("unhandled error in a request")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: Server

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the task has gone, or was cancelled
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        note = self.server.note
        if not hmac.compare_digest(self.headers.get(KEY, "").encode(), note.key.encode()):
            self._refuse(403, "wrong key")
            return
        if not self.path.startswith("/"):
            self._refuse(400, "not a path")
            return
        if (asked := self.headers.get(S3)) is not None:
            self._read_s3(asked)
            return
        token = self.server.token() if self.server.origin else None
        if token is None:
            self._refuse(502, NO_TOKEN)
            return
        session = make_session()
        with contextlib.closing(session):
            try:
                answer = self._ask(session, token)
            except Exception as error:  # noqa: BLE001 - the boundary: the task is told
                self._refuse(502, describe_failure(error, innermost(error), self._timeout_s()))
                return
            with contextlib.closing(answer):
                self._pass_on(answer)

    do_HEAD = do_GET

    def _ask(self, session: requests.Session, token: str) -> requests.Response:
        url = self.server.origin + self.path
        headers = {name: value for name in _PASSED if (value := self.headers.get(name)) is not None}
        return session.request(
            self.command,
            url,
            headers={"Accept-Encoding": "identity", **headers, "Authorization": f"Bearer {token}"},
            timeout=self._timeout_s(),
            allow_redirects=False,
            stream=True,
            **options_for(url),
        )

    def _read_s3(self, asked: str) -> None:
        reader = self.server.s3
        try:
            if reader is None:
                raise S3Error("refused", NO_S3)
            try:
                location = parse(f"{PREFIX}{unquote(asked)}")  # again: a task's code may ask for anything
            except ValueError as error:
                raise S3Error("refused", str(error)) from None
            if (at_most := self.headers.get(S3_LIST)) is not None:
                data = msgspec.json.encode(reader.list(location, min(int(at_most), MAX_LISTED)))
                self.send_response_only(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            found = reader.get(location, self.headers)
        except S3Error as error:
            self.send_response_only(error.status if error.status in _ANSWERS else 502)
            self.send_header(S3_FAULT, f"{error.kind}:{quote(str(error))}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with contextlib.closing(found["Body"]) as body:
            self._send_object(found, body)

    def _send_object(self, found: dict[str, Any], body: Any) -> None:
        self.send_response_only(206 if found.get("ContentRange") else 200)
        for name, value in (
            ("ETag", found.get("ETag")),
            ("Content-Range", found.get("ContentRange")),
            ("Content-Length", found.get("ContentLength")),
        ):
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        try:
            while data := body.read(CHUNK_BYTES):
                self.wfile.write(data)
        except Exception as error:  # noqa: BLE001 - botocore's own, and those of what it uses
            log.warning("an object broke off: %s", type(error).__name__)
            self.close_connection = True

    def _timeout_s(self) -> float:
        try:
            return min(max(float(self.headers.get(TIMEOUT, 30)), 0.001), MAX_TIMEOUT_S)
        except ValueError:
            return 30.0

    def _pass_on(self, answer: requests.Response) -> None:
        self.send_response_only(answer.status_code, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _NOT_RETURNED:
                self.send_header(name, value)
        bodiless = self.command == "HEAD" or answer.status_code in {204, 304}
        chunked = not bodiless and "Content-Length" not in answer.headers
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if bodiless:
            return
        try:
            while data := answer.raw.read(CHUNK_BYTES, decode_content=False):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        except (OSError, _http_error()) as error:
            log.warning("the answer broke off: %s", type(error).__name__)
            self.close_connection = True  # so that the task sees that something is missing
            return
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: int, why: str) -> None:
        self.send_response_only(status)
        self.send_header(ERROR, " ".join(why.split()).encode("ascii", "replace").decode())
        self.send_header("Content-Length", "0")
        self.end_headers()


def _http_error() -> type[Exception]:
    import urllib3.exceptions

    return urllib3.exceptions.HTTPError


def main(pipe: Pipe, folder: Path) -> int:
    """Serve until killed, or until the socket is gone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    note = read_note(folder / NOTE_FILE, Note)
    if note is None:
        log.error("%s cannot be read", folder / NOTE_FILE)
        return 1
    given = credentials_of(pipe)
    os.umask(0o077)
    with Server(note, None if note.token_file is not None else given.token, given.s3) as server:
        server.serve_forever(poll_interval=5.0)
    return 0
