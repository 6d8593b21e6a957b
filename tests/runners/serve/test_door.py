"""Who answers while no process serves: clients get a whole answer, whatever they send, and never hang."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading

import pytest

from runners.serve import door as doors
from runners.serve.door import Door


@pytest.fixture
def port(request: pytest.FixtureRequest):
    """Of a door that answers until the test is over."""
    over = threading.Event()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        door = Door(listener)
        door.open()

        def answer() -> None:
            while not over.wait(0.01):
                door.answer()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join()
            door.close()


@pytest.mark.parametrize("body", [b"", b"x" * 3_000_000])
def test_a_request_is_told_to_come_again(port: int, body: bytes) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as client:
        client.request("POST", "/v1/completions", body)
        answer = client.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert b"being loaded" in answer.read()


def test_clients_that_say_nothing_are_let_go(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "LINGER_S", 0.05)
    monkeypatch.setattr(doors, "MOST", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(8)]
        assert [client.recv(1) for client in clients] == [b""] * 8
