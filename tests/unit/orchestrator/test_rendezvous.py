"""Where the members of a task on several nodes meet: this node's own address, and a port that nobody listens on."""

from __future__ import annotations

import socket

import pytest

from flowmesh.orchestrator.rendezvous import free_port, own_address


def listening() -> tuple[socket.socket, int]:
    server = socket.create_server(("", 0))
    return server, server.getsockname()[1]


def test_a_port_of_the_range_that_is_free() -> None:
    server, port = listening()
    with server:
        assert free_port(f"{port}-{port}", ()) is None
        found = free_port(f"{port}-{min(port + 50, 65535)}", ())
        assert found is not None
        assert found > port
        assert free_port(f"{port}-{found}", (found,)) is None
    assert free_port(None, ()) is not None


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1:6390/0", "127.0.0.1"),
        ("rediss://user:word@localhost", "127.0.0.1"),
        ("unix:///run/redis.sock", "127.0.0.1"),
        ("redis+sentinel://127.0.0.1:26379,10.0.0.1:26379/main", "127.0.0.1"),
    ],
)
def test_the_way_to_redis(url: str, address: str) -> None:
    assert own_address(url) in (address, "::1")
