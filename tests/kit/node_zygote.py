"""Starts nodes as forks of a process that has imported the supervisor: half a second of CPU time less for each node.

A forked node has the arguments, the environment, the folder, the output and the session that an executed one has. What
is read from a process's first environment (LD_PRELOAD, PYTHONPATH, the secrets in /proc) needs an executed one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh.processes.environ import SECRETS
from tests.kit.paths import ROOT

MODULE = "flowmesh.cli.supervisor"
PRELOAD = (
    MODULE,
    "flowmesh.supervisor",
    "flowmesh.startup.preflight",
    "flowmesh.settings.load",
    "flowmesh.cli.logs_setup",
    "flowmesh.cli.guard",
)
AT_EXEC = ("LD_", "PYTHON", "LC_", "LANG", "TZ", "MALLOC_", "GLIBC_", "OPENSSL_", "SSL_")
"""Variables that are read when a program starts, or when a library is imported."""
STATUS = struct.Struct("i")


class Start(msgspec.Struct, frozen=True):
    """What the fork becomes."""

    arguments: list[str]
    environment: dict[str, str]
    cwd: str


class Forked:
    """A node that the zygote forked, with what the tests use of subprocess.Popen."""

    def __init__(self, pid: int, handle: int, channel: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._handle = handle
        self._channel = channel

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                assert timeout is not None
                raise subprocess.TimeoutExpired(MODULE, timeout)
            data = self._channel.recv(STATUS.size)
            self.returncode = STATUS.unpack(data)[0] if data else -signal.SIGKILL  # the zygote is gone with its nodes
            self._channel.close()
            os.close(self._handle)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | Forked


class Zygote:
    """The forking process, seen from the tests."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(far.fileno())],
                cwd=ROOT,
                env=dict(environment),
                pass_fds=(far.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket.settimeout(120)
        assert self._socket.recv(16) == b"ready", "the zygote of nodes did not start"

    def start(self, start: Start, output: int) -> Forked:
        mine, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with status:
            socket.send_fds(self._socket, [msgspec.msgpack.encode(start)], [output, status.fileno()])
        data, handles, _, _ = socket.recv_fds(self._socket, 16, 1)
        return Forked(int(data), handles[0], mine)

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()


_zygotes: dict[tuple[tuple[str, str], ...], Zygote | None] = {}


def start(arguments: list[str], environment: Mapping[str, str], cwd: Path, output: int) -> Forked | None:
    """A forked node; None where it has to be executed.

    Args:
        environment: the whole one.
        output: the descriptor of its stdout and stderr.
    """
    if any(environment.get(name) for name in (*SECRETS, "LD_PRELOAD")):
        return None
    key = tuple(sorted((name, value) for name, value in environment.items() if name.startswith(AT_EXEC)))
    if key not in _zygotes:
        _zygotes[key] = None  # made for the second node with these: most other ones are the only ones
        return None
    zygote = _zygotes[key]
    if zygote is None:
        zygote = _zygotes[key] = Zygote(environment)
        owner = os.getpid()
        atexit.register(lambda: zygote.close() if os.getpid() == owner else None)
    return zygote.start(Start(arguments, dict(environment), str(cwd)), output)


def main(fd: int) -> int:
    """Returns in the zygote at its end, and in each fork with the node's exit status."""
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each node looks through all that is imported here, and copies it by that
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    channel = socket.socket(fileno=fd)
    channel.send(b"ready")
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready, _ in poller.poll():
            if ready in running:
                poller.unregister(ready)
                pid, status = running.pop(ready)
                with contextlib.suppress(OSError), status:
                    status.send(STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(ready)
                continue
            data, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 2)
            if not data:
                return 0
            pid = os.fork()
            if pid == 0:
                for each in (channel, *(status for _, status in running.values())):
                    each.detach()  # `become` closes all descriptors
                return become(msgspec.msgpack.decode(data, type=Start), descriptors[0])
            os.close(descriptors[0])
            handle = os.pidfd_open(pid)
            socket.send_fds(channel, [str(pid).encode()], [handle])
            running[handle] = (pid, socket.socket(fileno=descriptors[1]))
            poller.register(handle, select.POLLIN)


def become(start: Start, output: int) -> int:
    """Be the node, to its end."""
    from flowmesh.reporting import sender

    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.cwd)
    # Counted from the time of the import: a node that is started again must not repeat numbers.
    sender._attempts = itertools.count(sender.FIRST_ATTEMPT + time.time_ns() // 1_000_000)
    sys.argv = [str(Path(sys.modules[MODULE].__file__ or "")), *start.arguments]
    sys.orig_argv[1:] = ["-m", MODULE, *start.arguments]  # which a node executes that replaces itself
    return int(sys.modules[MODULE].main())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
