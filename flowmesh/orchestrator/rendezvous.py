"""Where the members of a task on several nodes meet, if this node has its rank 0: an address, and a free port."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

from flowmesh.messages.sentinel import is_sentinel, sentinel_address
from flowmesh.web.own_address import address_towards

ANYWHERE = "127.0.0.1"
"""Of a node that reaches Redis by a unix socket: all others do, too, so they are on this machine."""


def own_address(redis_url: str) -> str:
    """The address from which this node reaches Redis. Blocks while the name of Redis' host is resolved.

    Raises:
        OSError: the host is not known, or there is no way to it.
    """
    from urllib.parse import urlsplit

    if is_sentinel(redis_url):
        host, port = sentinel_address(redis_url).hosts[0]
    else:
        parts = urlsplit(redis_url)
        if parts.scheme == "unix":
            return ANYWHERE
        host, port = parts.hostname or "localhost", parts.port or 6379
    return address_towards(host, port)


def free_port(ports: str | None, taken: Collection[int]) -> int | None:
    """A TCP port that nobody listens on now; None: all are in use.

    Args:
        ports: `FIRST-LAST`; None: any that the kernel gives.
        taken: ports of tasks that perhaps do not listen on them yet.
    """
    if ports is None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])
    first, _, last = ports.partition("-")
    for port in range(int(first), int(last) + 1):
        if port not in taken:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
                return port
    return None
