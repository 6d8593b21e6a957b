"""Sends files to test servers."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from flowmesh.messages.output import HttpDestination, file_url, read_output
from flowmesh.results.request_bodies import FileBody
from flowmesh.results.throttle import Throttle
from flowmesh.results.upload import Uploader
from tests.kit.http_server import Received

SIZE = 3_000_000


def destination(url: str, **fields: Any) -> HttpDestination:
    made = read_output({"destination": {"type": "http", "url": url, **fields}}).destination
    assert isinstance(made, HttpDestination)
    return made


def uploader(url: str, *, within_s: float = 20.0, rate: int | None = None, **options: Any) -> Uploader:
    fields = options.pop("fields", {})
    options.setdefault("first_backoff_s", 0.01)
    options.setdefault("max_backoff_s", 0.05)
    return Uploader(
        destination(url, **fields), deadline=time.monotonic() + within_s, throttle=Throttle(rate), **options
    )


def send_file(sender: Uploader, url: str, path: Path, name: str = "weights.bin") -> None:
    try:
        sender.send("POST", file_url(url, "t-1"), FileBody.at(path, name))
    finally:
        sender.close()


def assert_whole(received: Received, path: Path) -> None:
    assert received.file_size == path.stat().st_size
    assert received.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
