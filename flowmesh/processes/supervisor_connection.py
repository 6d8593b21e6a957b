"""The fork server's side of its socket: one supervisor at a time, the one that connected last."""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections import deque

import msgspec

from flowmesh.processes.protocol import MAX_MESSAGE, Reply, Request, Unfit, encode, request_decoder


class SupervisorConnection:
    """
    Args:
        listener: the listening socket.
        poller: gets the supervisor's socket registered.
    """

    def __init__(self, listener: socket.socket, poller: select.epoll) -> None:
        self._listener = listener
        self._poller = poller
        self._supervisor: socket.socket | None = None
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._alone_since = time.monotonic()
        """Since when there is no supervisor, if there is none."""

    @property
    def connected(self) -> bool:
        return self._supervisor is not None

    @property
    def alone_s(self) -> float:
        """How long there has been no supervisor; 0 if there is one."""
        return 0.0 if self.connected else time.monotonic() - self._alone_since

    def begin(self) -> None:
        """Supervisors can be accepted from now on."""
        self._alone_since = time.monotonic()

    def listen_at(self, listener: socket.socket) -> None:
        """Accept supervisors at another socket from now on."""
        self._listener = listener

    def is_for(self, fd: int) -> bool:
        """Whether an event of the poller is the supervisor's."""
        return self._supervisor is not None and fd == self._supervisor.fileno()

    def accept(self) -> bool:
        """Take a supervisor that connects; it replaces an earlier one, which is dead or about to end."""
        try:
            supervisor, _ = self._listener.accept()
        except OSError:
            return False
        self._drop()
        supervisor.setblocking(False)
        supervisor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)
        self._supervisor = supervisor
        self._poller.register(supervisor, select.EPOLLIN)
        return True

    def receive(self) -> tuple[Request, bytes] | None:
        """The next request, decoded and as it came; None if there is none, or the supervisor is gone."""
        assert self._supervisor is not None
        try:
            data = self._supervisor.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self._drop()
            return None
        try:
            return request_decoder.decode(data), data
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # of another version: no reason to end any task
            sys.stderr.write(f"unknown request ignored: {error}\n")
            sys.stderr.flush()
            return None

    def send(self, reply: Reply, fd: int | None = None) -> None:
        """Send a reply, in order and without waiting; dropped if there is no supervisor.

        Args:
            fd: a descriptor that goes with it.
        """
        if self._supervisor is not None:
            self._outgoing.append((encode(reply), [] if fd is None else [fd]))
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        assert self._supervisor is not None
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                socket.send_fds(self._supervisor, [data], fds, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._poller.modify(self._supervisor, select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._drop()
                return
            self._outgoing.popleft()
        self._poller.modify(self._supervisor, select.EPOLLIN)

    def refuse(self, reply: Unfit, timeout_s: float) -> None:
        """Send this to the first supervisor that connects within the timeout."""
        self._listener.setblocking(True)
        self._listener.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            supervisor, _ = self._listener.accept()
            supervisor.send(encode(reply), socket.MSG_NOSIGNAL)

    @property
    def descriptors(self) -> list[int]:
        """Those of its sockets, which a forked child closes."""
        return [each.fileno() for each in (self._listener, self._supervisor) if each is not None]

    def _drop(self) -> None:
        if self._supervisor is not None:
            self._poller.unregister(self._supervisor)
            self._supervisor.close()
            self._supervisor = None
            self._outgoing.clear()
            self._alone_since = time.monotonic()
