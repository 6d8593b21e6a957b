"""The watch over a server: it ends where health checks fail, and does not where requests are answered."""

from __future__ import annotations

import contextlib
import socket

import pytest

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from runners.serve.gate import Gate
from runners.serve.runner import Server, ServerLost, watch
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


def test_three_failed_health_checks_end_the_task_with_what_was_wrong(make_context) -> None:
    ctx = make_context({})
    announced: list[int] = []
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        gate = Gate(broken, "key", "m", "pinned", own_key="own")
        server = Server(gate, listener, "m", "own")
        try:
            with pytest.raises(ServerLost, match="3 health checks in a row failed; the last one: status 500: lost"):
                watch(ctx, Serve(health_interval_s=0.01), server, 0.0, lambda: announced.append(1))
        finally:
            server.stop()
    assert not server.alive
    assert announced
    assert gate.requests == 0
