"""A control client that does not read is cut off, and what waited for it is freed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from flowmesh.control import server as module
from flowmesh.control.server import ControlServer
from flowmesh.redaction import Redactor


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_WITHIN_S", 0.1)
    path = tmp_path / "s"
    gone: list[str] = []

    def subscribe(_task: str, put: module.Subscribe) -> object:
        for _ in range(40):
            put({"event": "log", "text": "x" * 100_000})
        return lambda: gone.append("unsubscribed")

    async def live() -> None:
        control = ControlServer(path, {"much": lambda _: {"text": "x" * 4_000_000}}, subscribe, Redactor(), bulk={})
        await control.start()
        for request in (b'{"op":"much"}\n', b'{"op":"watch","task_id":"t"}\n'):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(request)
                async with asyncio.timeout(20):
                    while not control._peers:
                        await asyncio.sleep(0.01)
                    while control._peers:
                        await asyncio.sleep(0.01)
        assert gone == ["unsubscribed"]
        reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 23)
        writer.write(b'{"op":"much"}\n')
        assert len(await reader.readline()) > 4_000_000, "others are answered"
        writer.close()
        await control.close()

    asyncio.run(live())
