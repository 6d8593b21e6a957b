"""torchrun whose store listens on the rendezvous endpoint's address. By itself it listens on all addresses.

That is so for both ways to meet: `c10d`, where torchrun numbers the nodes, and `static`, where they are numbered.

Run as `python -m runners.training.rendezvous` with torchrun's arguments.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous
from torch.distributed.run import main


def bound_store(host: str, port: int, *args: Any, is_master: bool = False, **options: Any) -> TCPStore:
    """`TCPStore`, which as the master listens on the address of `host`.

    Raises:
        RuntimeError: this machine has no such address, or the port is taken. torchrun tries to be a client then.
    """
    if not is_master:
        return TCPStore(host, port, *args, is_master=False, **options)
    try:
        listener = listen(host, port)
    except OSError as error:
        raise RuntimeError(f"cannot listen on {host}:{port}: {error}") from error
    return TCPStore(host, port, *args, is_master=True, master_listen_fd=listener.detach(), **options)


def static_store(
    host: str, port: int, world: int, is_master: bool, timeout: datetime.timedelta, *, multi_tenant: bool
) -> TCPStore:
    """The same as the static rendezvous calls it. Nodes wait for each other's keys, which name the run, rather than
    for a number of connections."""
    return bound_store(
        host, port, world, is_master=is_master, timeout=timeout, multi_tenant=multi_tenant, wait_for_workers=False
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the first address of `host` and on no other."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


if __name__ == "__main__":
    c10d_rendezvous_backend.TCPStore = bound_store
    static_tcp_rendezvous.TCPStore = static_store
    main()
