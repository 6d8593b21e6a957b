"""The watch over a server: it ends where health checks fail, and does not where requests are answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import time

import pytest

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from runners.serve import runner
from runners.serve.errors import ServerLost
from runners.serve.gate import App, Gate, ServedModel
from runners.serve.runner import Server, watch
from runners.serve.task import Serve


async def broken(scope, receive, send) -> None:
    """Like a server whose model cannot compute any more."""
    while scope["type"] == "lifespan":
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
    await receive()
    await send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"lost"})


async def hanging(scope, receive, send) -> None:
    """Like a server whose model computes for ever."""
    if scope["type"] == "lifespan":
        await broken(scope, receive, send)
    await asyncio.sleep(3600)


class Bare:
    """An application without an engine."""

    models = (ServedModel(name="m", pinned="m"),)
    asks_usage = False
    source = "m"

    def __init__(self, app: App) -> None:
        self.app = app
        self.fields: dict[str, list[str]] = {}

    def failure(self) -> None:
        """Nothing is known against it."""

    def engine_numbers(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """It has started nothing."""


def test_three_failed_health_checks_end_the_task_with_what_was_wrong(make_context) -> None:
    ctx = make_context({})
    announced: list[int] = []
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        served = Bare(broken)
        gate = Gate(broken, "key", served.models, own_key="own")
        server = Server(gate, listener, "m", "own")
        try:
            with pytest.raises(ServerLost, match="3 health checks in a row failed; the last one: status 500: lost"):
                watch(ctx, Serve(health_interval_s=0.01), server, served, lambda: announced.append(1), since=0.0)
        finally:
            server.stop()
    assert not server.alive
    assert announced
    assert gate.requests == 0


def test_a_server_that_hangs_with_requests_is_found(make_context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is being answered is a sign of health, but not for ever."""
    monkeypatch.setattr(runner, "SILENT_S", 0.3)
    monkeypatch.setattr(runner, "HEALTH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(runner, "STOP_S", 0)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        served = Bare(hanging)
        gate = Gate(hanging, "key", served.models, own_key="own")
        server = Server(gate, listener, "m", "own")
        host, port = listener.getsockname()
        client = http.client.HTTPConnection(host, port)
        try:
            client.request("POST", "/v1/completions", "{}", {"Authorization": "Bearer key"})
            with pytest.raises(ServerLost, match="3 health checks in a row failed; the last one: TimeoutError"):
                watch(
                    make_context({}),
                    Serve(health_interval_s=0.01),
                    server,
                    served,
                    lambda: None,
                    since=time.monotonic(),
                )
        finally:
            client.close()
            server.stop()
    assert gate.requests == 1
