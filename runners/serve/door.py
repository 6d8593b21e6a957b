"""Answers 503 on the served address while no process serves there, so that clients neither hang nor are refused."""

from __future__ import annotations

import contextlib
import socket
import time

LINGER_S = 2.0
"""How long a client may take to send its request and to read its answer."""
MOST = 256
"""Connections at once; the oldest one is closed for another."""
RETRY_AFTER_S = 5
_BODY = b'{"error": {"message": "the model is being loaded; try again", "type": "server_error", "code": 503}}'
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Retry-After: %d\r\nContent-Length: %d\r\n\r\n%b" % (RETRY_AFTER_S, len(_BODY), _BODY)
)


class Door:
    """Used by one thread, which calls `answer` whenever one of `waits_for` can be read, and at least once a second.

    Args:
        listener: the task's, which the serving process listens on, too.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._clients: dict[socket.socket, float] = {}
        """When each came."""
        self._open = False

    def open(self) -> None:
        """Answer from now on."""
        self._open = True

    def shut(self) -> None:
        """Leave new connections to the serving process."""
        self._open = False

    def waits_for(self) -> list[socket.socket]:
        return [*self._clients, *([self._listener] if self._open else [])]

    def answer(self) -> None:
        """Take new connections, and answer those whose request has begun to arrive. Does not block."""
        for client in list(self._clients):
            self._serve(client)
        while self._open:
            try:
                client, _ = self._listener.accept()
            except OSError:  # none waits, or it has gone again
                break
            client.setblocking(False)
            if len(self._clients) >= MOST:
                self._end(next(iter(self._clients)))
            self._clients[client] = time.monotonic()
            self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        """What a client sends is read to its end: else it would see a reset in place of the answer."""
        try:
            while client.recv(65536):
                with contextlib.suppress(OSError):  # it was answered before
                    client.send(_ANSWER)
                    client.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            if time.monotonic() - self._clients[client] < LINGER_S:
                return
        except OSError:
            pass  # it has gone
        self._end(client)

    def _end(self, client: socket.socket) -> None:
        del self._clients[client]
        client.close()

    def close(self) -> None:
        """End all connections; the listener is its owner's."""
        for client in list(self._clients):
            self._end(client)
