"""The datagrams that systemd gets, on a real socket; and none without systemd."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from flowmesh.node.systemd import Notifier


def listening(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(5.0)
    return sock


def test_fields_arrive_in_one_datagram(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as systemd:
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).send(READY="1", STATUS="2 tasks")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=2 tasks"


def test_an_abstract_socket_is_written_with_an_at_sign() -> None:
    name = f"flowmesh-test-{os.getpid()}"
    with listening(f"\0{name}") as systemd:
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).send(STOPPING="1")
        assert systemd.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nowhere/notify"}], ids=["no systemd", "it is gone"])
def test_without_a_listener_nothing_happens(environ: dict[str, str]) -> None:
    Notifier(environ).send(READY="1")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_interval(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environ).watchdog_s == seconds
