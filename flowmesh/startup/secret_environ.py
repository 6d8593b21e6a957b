"""The environment variables that hold the node's secrets: taken out of the environment, and handed over an exec.

The environment that a process was started with can be read by every process of the same user, from the exec until the
process hides itself. A node that replaces itself therefore starts the new program without them. They wait in a socket:
unlike a pipe or a file, it cannot be opened a second time through /proc.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import msgspec

from flowmesh.processes import linux
from flowmesh.processes.environ import SECRETS

VARIABLE = "FLOWMESH_SECRETS_FD"
"""Names the descriptor of the socket that they wait in."""
MAX_BYTES = 64 * 1024


def take(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Hide this process from others of its user, then take the secrets out of its environment.

    Args:
        environ: `os.environ`. Loses the secret variables, and VARIABLE.

    Returns:
        the whole environment, with the secrets: those that an earlier program handed over, else its own.
    """
    linux.hide_from_same_user()
    handed = _received(environ.pop(VARIABLE, None))
    secret = {name: value for name in SECRETS if (value := environ.pop(name, None)) is not None}
    return {**environ, **secret, **handed}


def _received(descriptor: str | None) -> dict[str, str]:
    if descriptor is None or not descriptor.isdecimal():
        return {}
    try:
        with socket.socket(fileno=int(descriptor)) as waiting:
            waiting.setblocking(False)
            return msgspec.msgpack.decode(waiting.recv(MAX_BYTES), type=dict[str, str])
    except (OSError, msgspec.DecodeError):  # a variable that somebody else has set
        return {}


@contextmanager
def handed_over(environ: Mapping[str, str]) -> Iterator[tuple[dict[str, str], int]]:
    """The environment for a program that takes the secrets with `take`, and the descriptor that it must inherit.

    Args:
        environ: what `take` returned.

    Raises:
        OSError: they do not fit into a socket.
    """
    secret = {name: environ[name] for name in SECRETS if name in environ}
    sender, waiting = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with waiting:
        with sender:
            sender.setblocking(False)
            sender.send(msgspec.msgpack.encode(secret))
        waiting.set_inheritable(True)
        plain = {name: value for name, value in environ.items() if name not in SECRETS}
        yield {**plain, VARIABLE: str(waiting.fileno())}, waiting.fileno()
