"""The orchestrator's HTTP side on loopback: takes results and files, and gives the files back."""

from __future__ import annotations

import email.parser
import email.policy
import json
from pathlib import Path

from tests.kit.fake_http import FakeHandler, FakeServer


class ResultsServer(FakeServer):
    """As docs/contract.md §2 has it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.results: dict[str, dict] = {}
        self.token: str | None = None
        """The Authorization header without which nothing is taken and nothing given."""


class _Handler(FakeHandler):
    server: ResultsServer

    def do_POST(self) -> None:
        body = self.body()
        if not self._is_known():
            return
        parts = self.path.strip("/").split("/")
        assert parts[:3] == ["api", "v1", "results"]
        if parts[3:] == []:
            message = json.loads(body)
            self.server.results[message["task_id"]] = message["result"]
        else:
            assert parts[4:] == ["files"]
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            (part,) = form.iter_parts()
            assert part.get_param("name", header="content-disposition") == "file"
            target = self.server.folder / parts[3]
            target.mkdir(exist_ok=True)
            (target / Path(part.get_filename() or "").name).write_bytes(part.get_payload(decode=True))
        self.answer(200, b"{}")

    def _is_known(self) -> bool:
        wanted = self.server.token
        if wanted is None or self.headers.get("Authorization") == wanted:
            return True
        self.answer(401, b"no")
        return False

    def do_GET(self) -> None:
        if not self._is_known():
            return
        _, _, _, task_id, _, name = self.path.strip("/").split("/")
        path = self.server.folder / task_id / name
        self.answer(*((200, path.read_bytes()) if path.is_file() else (404, b"no such file")))
