"""This machine's own address on the way to another one."""

from __future__ import annotations

import socket


def address_towards(host: str, port: int = 9) -> str:
    """The address that packets to a host come from. Nothing is sent: connecting a datagram socket only chooses the way.

    Blocks while the host's name is resolved, if it is one.

    Raises:
        OSError: the host is not known, or there is no way to it.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])
