"""How the members of one engine over several nodes keep together: the first says what to start, and when it is over.

The others connect to the first member's port. A connection that ends before the first one has said that all is done
means that the other side is gone; vLLM itself would wait for it without end.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from collections.abc import Iterator

import msgspec

from flowmesh.messages.job import Fault
from flowmesh.messages.nodes import Gang
from runners.api import Context, RunnerError
from runners.inference.interrupt import interrupted
from runners.inference.vllm_args import Work

POLL_S = 0.2
START_S = 1800.0
"""How long a member waits for the others: each may have to fetch the model first."""
SETTLE_S = 3.0
"""From the loss of another member to the failure of this one, so that the other's own error is known before."""
MOST_BYTES = 65536
SIGNAL = signal.SIGRTMIN + 1
"""Interrupts the main thread; `vllm_processes` has another."""
_DONE = b"done\n"


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What all members must start with alike."""

    port: int
    """Of vLLM's own store, on the first member's node."""
    work: Work
    seed: int


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """By which a member joins."""

    rdzv_id: str
    rank: int


class Gone(RunnerError):
    """Another member is gone."""

    fault = Fault.CRASH


class Lead:
    """The first member's side."""

    def __init__(self, ctx: Context, gang: Gang, listener: socket.socket) -> None:
        self._ctx = ctx
        self.gang = gang
        self._listener = listener
        self._members: dict[int, socket.socket] = {}

    def announce(self, start: Start) -> None:
        """Wait for all members, and have them start.

        Raises:
            Gone: one did not come in time.
            Cancelled: the node asked the task to stop.
        """
        self._wait()
        for peer in self._members.values():
            peer.sendall(msgspec.json.encode(start) + b"\n")

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while len(self._members) < self.gang.size - 1:
            self._accept(deadline)

    def _accept(self, deadline: float) -> None:
        """Take the next member that comes. Whoever does not know the attempt's name is none."""
        while not select.select([self._listener], [], [], POLL_S)[0]:
            self._ctx.check_cancelled()
            if time.monotonic() > deadline:
                raise Gone(f"spec.nodes: {len(self._members) + 1} of {self.gang.size} members came; see their logs")
        peer, _ = self._listener.accept()
        _keep_alive(peer)
        peer.settimeout(POLL_S * 10)
        try:
            hello = msgspec.json.decode(_line(peer), type=Hello)
        except (OSError, EOFError, msgspec.MsgspecError):
            peer.close()
            return
        if hello.rdzv_id != self.gang.rdzv_id or not 0 < hello.rank < self.gang.size or hello.rank in self._members:
            peer.close()
            return
        peer.settimeout(None)
        self._members[hello.rank] = peer

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Interrupt the body if a member is gone. On the main thread.

        Raises:
            Gone: naming it, also where the body has failed by the loss.
            Cancelled: the node asked the task to stop.
        """
        peers = {peer.fileno(): rank for rank, peer in self._members.items()}
        try:
            with _until_readable(list(peers)):
                yield
        except Exception as error:
            if not (lost := _readable(list(peers))):
                raise
            self._ctx.sleep(SETTLE_S)
            raise Gone(f"member {peers[lost[0]]} is gone; see its own log") from error

    def done(self) -> None:
        """All is generated; members that come only now have nothing to do. Errors as for `announce`."""
        self._wait()
        for peer in self._members.values():
            with contextlib.suppress(OSError):
                peer.sendall(_DONE)

    def close(self) -> None:
        for sock in (self._listener, *self._members.values()):
            sock.close()


@contextlib.contextmanager
def lead(ctx: Context, gang: Gang) -> Iterator[Lead]:
    """Listen for the other members, and tell them when the body has succeeded.

    Raises:
        RunnerError: the port cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(gang.host, gang.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(gang.size)
    except OSError as error:
        raise Gone(f"spec.nodes: cannot listen on {gang.host}:{gang.port}: {error}") from error
    found = Lead(ctx, gang, listener)
    try:
        yield found
        found.done()
    finally:
        found.close()


class Follower:
    """Another member's side."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def start(self, ctx: Context) -> Start | None:
        """What to start; None: there is nothing to do.

        Raises:
            Gone: the first member has ended.
            Cancelled: the node asked the task to stop.
        """
        while not select.select([self._socket], [], [], POLL_S)[0]:
            ctx.check_cancelled()
        try:
            line = _line(self._socket)
        except (OSError, EOFError):
            raise settled(ctx) from None
        return None if line == _DONE else msgspec.json.decode(line, type=Start)

    @contextlib.contextmanager
    def until_over(self, ctx: Context) -> Iterator[None]:
        """Interrupt the body at the end of the first member.

        Raises:
            Over: it has its answers.
            Gone: it has ended without.
        """
        try:
            with _until_readable([self._socket.fileno()]):
                yield
        except Exception as error:
            if not _readable([self._socket.fileno()]):
                raise
            if not self._is_done():
                raise settled(ctx) from error
            raise Over from None

    def _is_done(self) -> bool:
        try:
            return _line(self._socket) == _DONE
        except (OSError, EOFError):
            return False


class Over(Exception):
    """The first member has what it wants."""


_ENDED = "the first member ended without a result; see its own log"


def settled(ctx: Context) -> Gone:
    """The error of a member whose first member is gone, after a time in which that one's own error becomes known."""
    ctx.sleep(SETTLE_S)
    return Gone(_ENDED)


@contextlib.contextmanager
def follow(ctx: Context, gang: Gang) -> Iterator[Follower]:
    """Connect to the first member, once it listens.

    Raises:
        Gone: it does not in time.
        Cancelled: the node asked the task to stop.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            sock = socket.create_connection((gang.host, gang.port), timeout=10)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise Gone(
                    f"spec.nodes: the first member does not listen on {gang.host}:{gang.port}: {error}"
                ) from None
            ctx.sleep(POLL_S)
    with sock:
        sock.settimeout(None)
        _keep_alive(sock)
        sock.sendall(msgspec.json.encode(Hello(rdzv_id=gang.rdzv_id, rank=gang.rank)) + b"\n")
        yield Follower(sock)


def _line(peer: socket.socket) -> bytes:
    """The next line. Bytewise, since what follows it is not for this reader.

    Raises:
        EOFError: the connection has ended.
    """
    found = b""
    while not found.endswith(b"\n") and len(found) < MOST_BYTES:
        if not (byte := peer.recv(1)):
            raise EOFError
        found += byte
    return found


def _keep_alive(peer: socket.socket) -> None:
    """Have the kernel find within a minute that the other machine is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


class _Ready(Exception):
    """Something can be read."""


def _until_readable(fds: list[int]) -> contextlib.AbstractContextManager[None]:
    """Run the body, and raise `_Ready` into it as soon as one of the descriptors can be read."""
    return interrupted(SIGNAL, lambda _: _Ready() if _readable(fds, POLL_S) else None)


def _readable(fds: list[int], timeout_s: float = 1.0) -> list[int]:
    """Those of the descriptors that can be read within a time."""
    return select.select(fds, [], [], timeout_s)[0]
