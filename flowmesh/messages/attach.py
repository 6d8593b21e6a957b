"""How `flowmesh exec` hands its terminal to a task: over a unix socket that the task's process connects to.

The caller listens. It sends one message: 4 bytes of length (big endian), then that much JSON (`Caller`), with the
descriptors of standard input, output and error beside the first byte. After that each byte from it is the number of a
signal for the program. If the connection ends, the caller is gone.
"""

from __future__ import annotations

import array
import socket
import struct

import msgspec

FDS = 3
MAX_BYTES = 16 * 1024 * 1024
CONNECT_S = 10.0
_LENGTH = struct.Struct(">I")


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """What a program gets from the shell in which it was called."""

    argv: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    umask: int


class Attached(msgspec.Struct, frozen=True):
    """The program's side."""

    caller: Caller
    stdio: tuple[int, int, int]
    """Descriptors, which are the receiver's now."""
    connection: socket.socket
    """Gives the numbers of signals; at its end the caller is gone."""


def send(connection: socket.socket, caller: Caller, stdio: tuple[int, int, int]) -> None:
    """The caller's side; raises OSError."""
    data = msgspec.json.encode(caller)
    message = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(connection, [message[:1]], list(stdio))
    connection.sendall(message[sent:])


def receive(path: str) -> Attached:
    """Connect to a caller.

    Raises:
        OSError: nobody listens there, or it sends nothing within CONNECT_S.
        ValueError: it sends something else.
    """
    connection = socket.socket(socket.AF_UNIX)
    fds = array.array("i")
    try:
        connection.settimeout(CONNECT_S)
        connection.connect(path)
        first, received, _, _ = socket.recv_fds(connection, 1, FDS)
        fds.extend(received)
        (length,) = _LENGTH.unpack(first + _exactly(connection, _LENGTH.size - len(first)))
        if length > MAX_BYTES or len(fds) != FDS:
            raise ValueError("not a caller of flowmesh exec")
        try:
            caller = msgspec.json.decode(_exactly(connection, length), type=Caller)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from None
        connection.settimeout(None)
        return Attached(caller, (fds[0], fds[1], fds[2]), connection)
    except BaseException:
        connection.close()
        for fd in fds:
            socket.close(fd)
        raise


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count > 0:
        data = connection.recv(min(count, 1 << 16))
        if not data:
            raise ConnectionResetError("the caller is gone")
        parts.append(data)
        count -= len(data)
    return b"".join(parts)
