"""Gives this terminal to a task: its standard streams, working directory and environment, and then its signals."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import threading
from pathlib import Path
from types import TracebackType

from flowmesh.cli.private_folder import lock_folder, private_dir, sweep_abandoned
from flowmesh.errors import ConfigError
from flowmesh.files.removal import remove_path
from flowmesh.messages import attach
from flowmesh.messages.attach import Caller

PREFIX = "flowmesh-exec-"
NOT_PASSED = ("REDIS_URL", "ORCHESTRATOR_TOKEN")
"""Variables of this process that are the node's secrets."""


class Terminal:
    """Listens for the task's process, as a context manager.

    Args:
        argv: the program and its arguments.
    """

    def __init__(self, argv: tuple[str, ...]) -> None:
        mask = os.umask(0o77)
        os.umask(mask)
        env = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
        self._caller = Caller(argv=argv, cwd=str(Path.cwd()), env=env, umask=mask)
        self._peer: socket.socket | None = None
        sweep_abandoned(PREFIX)
        self._folder = private_dir(PREFIX)
        self._lock = lock_folder(self._folder)
        self.path = self._folder / "terminal.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Terminal:
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._peer is not None:
            self._peer.close()
        remove_path(self._folder)
        os.close(self._lock)

    def open_to(self, user: str) -> None:
        """Let this user's processes connect, which otherwise only those of this one may; needs root.

        Raises:
            ConfigError: there is no such user, or this one is not root.
        """
        try:
            uid = pwd.getpwnam(user).pw_uid
            for path in (self.path, self._folder):
                os.chown(path, uid, -1)
        except (KeyError, PermissionError):
            raise ConfigError(f"tasks run as {user}, who cannot be given this terminal: run this as root") from None

    def pass_on(self, number: int) -> bool:
        """Send a signal to the program; False: it has none yet, or no more."""
        if self._peer is None:
            return False
        try:
            self._peer.send(bytes([number]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def _serve(self) -> None:
        """Runs in a thread."""
        with contextlib.suppress(OSError):
            peer, _ = self._listener.accept()
            attach.send(peer, self._caller, (0, 1, 2))
            self._peer = peer
