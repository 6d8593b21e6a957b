"""The supervisor's side of one fork server: its process, its socket, its replies. All of it runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import secrets
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.errors import LaunchError
from flowmesh.processes import linux, preload
from flowmesh.processes.forkserver import Options
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import MAX_MESSAGE, Ready, Reply, Request, Unfit, encode, reply_decoder


class EnvironmentBroken(LaunchError):
    """Raised when an environment has no fork server that could fork: a fault of the node, not of the task."""


def socket_name(environment: str) -> str:
    """A new socket name; its length depends on the environment's name only."""
    return f"{environment}-{secrets.token_hex(4)}.sock"


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What a fork server is started from: an interpreter, and what it imports. Its tasks share the server."""

    name: str
    python: str
    preload: tuple[str, ...] = ()
    canary: str | None = None
    prepare: str | None = None
    rehearsal: str | None = None
    contained: bool = True
    """Whether its children get a cgroup each, on a node that can make them."""
    hidden: bool = False
    """Whether it and its children, which are given secrets, are hidden from other processes of the node's user."""


class ServerState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"
    """Takes no new tasks, and ends with its last one."""
    ENDED = "ended"


class Server:
    """One fork server, started by this supervisor or by an earlier one.

    Args:
        on_reply: (server, reply, pipe) for each of its messages; `pipe` is the child's, with Forked only.
        on_ended: (server), once, when the server is gone.
    """

    def __init__(
        self,
        environment: str,
        path: Path,
        *,
        on_reply: Callable[[Server, Reply, Pipe | None], None],
        on_ended: Callable[[Server], None],
    ) -> None:
        self.environment = environment
        self.id = path.stem
        self.path = path
        self.state = ServerState.STARTING
        self.ready: Ready | None = None
        self.pid: int | None = None
        self.answered = asyncio.get_running_loop().create_future()
        """Resolves to Ready or Unfit, or raises LaunchError if the server ended before it sent either."""
        self._on_reply = on_reply
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._outgoing: deque[bytes] = deque()
        self._sock: socket.socket | None = None

    @classmethod
    def start(
        cls,
        environment: Environment,
        folder: Path,
        env: Mapping[str, str],
        log: Path,
        *,
        adoption_timeout_s: float,
        cgroup: Path | None,
        made_of: str,
        nice: int = 0,
        **callbacks: Callable[..., None],
    ) -> Server:
        """Start a server and connect to it; it sends Ready, or Unfit, when its imports are done.

        Args:
            nice: how much nicer than this process its imports are.

        Raises:
            EnvironmentBroken: the interpreter is not there, or the folders cannot be written.
        """
        server = cls(environment.name, folder / socket_name(environment.name), **callbacks)
        with contextlib.ExitStack() as stack:
            try:
                for needed in (folder, log.parent):  # somebody may have deleted them
                    needed.mkdir(mode=0o700, exist_ok=True)
                output = stack.enter_context(open(log, "ab"))
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                listener.bind(str(server.path))
            except OSError as error:
                at = error.filename or server.path
                raise EnvironmentBroken(f"environment {environment.name}: {at}: {error.strerror or error}") from error
            listener.listen(4)
            options = Options(
                socket=str(server.path),
                fd=listener.fileno(),
                preload=environment.preload,
                canary=environment.canary,
                prepare=environment.prepare,
                rehearsal=environment.rehearsal,
                adoption_timeout_s=adoption_timeout_s,
                cgroup=None if cgroup is None else str(cgroup),
                hidden=environment.hidden,
                made_of=made_of,
                nice=nice,
            )
            # -P: the folder we were started in is no place to import from; tasks may write there
            command = [
                environment.python,
                "-P",
                "-m",
                "flowmesh.processes.forkserver",
                msgspec.json.encode(options).decode(),
            ]
            try:
                process = subprocess.Popen(
                    command,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd="/",  # our own folder may be deleted
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                server.path.unlink()
                message = f"environment {environment.name}: cannot start {environment.python}: {error.strerror}"
                raise EnvironmentBroken(message) from error
        process.returncode = 0  # the supervisor's SIGCHLD handler reaps it, not this object
        server.pid = process.pid
        server._connect()
        return server

    @classmethod
    def adopt(cls, path: Path, **callbacks: Callable[..., None]) -> Server | None:
        """Connect to a server that an earlier supervisor left; None if nothing listens at `path` any more."""
        server = cls(path.stem.rpartition("-")[0], path, **callbacks)
        try:
            server._connect()
        except OSError:
            path.unlink(missing_ok=True)
            return None
        return server  # its pid comes with Ready

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)
        self._sock = sock
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Disconnect; the server keeps its tasks and waits for the next supervisor."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    def kill(self) -> None:
        if self.pid is not None and self.state is not ServerState.ENDED:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def hasten(self) -> None:
        """A task waits for it: its imports get the CPU as all else does."""
        if self.pid is not None and self.state is ServerState.STARTING:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0))

    @property
    def serves(self) -> bool:
        """Whether it takes new tasks: ready, and not retiring."""
        return self.state is ServerState.READY

    def is_stale(self) -> bool:
        """Whether installed packages changed after it imported them."""
        return self.ready is not None and self.ready.stamp != preload.stamp(self.ready.packages)

    def send(self, request: Request) -> None:
        """Send a request, in order and without waiting.

        Raises:
            LaunchError: the message is larger than one may be, or the server is gone.
        """
        data = encode(request)
        if len(data) > MAX_MESSAGE:
            raise LaunchError(f"the task's environment variables take {len(data)} bytes; at most {MAX_MESSAGE} fit")
        if self._sock is None:
            raise EnvironmentBroken(f"fork server {self.id} is gone")
        self._outgoing.append(data)
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and self._sock is not None:
            try:
                self._sock.send(self._outgoing[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._end()
                return
            self._outgoing.popleft()
        if self._sock is not None:
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._end()
            return
        try:
            reply = reply_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.bind(server=self.id).warning("malformed message from the fork server: {}", error)
            for fd in fds:
                os.close(fd)
            return
        match reply:
            case Ready():
                self.pid = reply.pid
                self.ready = reply
                if self.state is ServerState.STARTING:
                    self.state = ServerState.READY
                if not self.answered.done():
                    self.answered.set_result(reply)
            case Unfit():
                if not self.answered.done():
                    self.answered.set_result(reply)
        self._on_reply(self, reply, Pipe(socket.socket(fileno=fds[0])) if fds else None)

    def _end(self) -> None:
        if self.state is ServerState.ENDED:
            return
        self.state = ServerState.ENDED
        self.close()
        self.path.unlink(missing_ok=True)
        if not self.answered.done():
            self.answered.set_exception(
                EnvironmentBroken(f"environment {self.environment}: its fork server ended while it started")
            )
            self.answered.exception()  # retrieved, so that asyncio does not warn if nobody awaits it
        self._on_ended(self)

    async def gone(self, timeout_s: float) -> bool:
        """Wait for the process itself to end."""
        if self.pid is None:
            return True
        return await asyncio.to_thread(linux.wait_gone, self.pid, timeout_s)
