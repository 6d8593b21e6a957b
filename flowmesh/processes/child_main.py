"""The first lines of a forked child: limits, descriptors, environment; then the work it was forked for."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.processes import limits, linux, threads
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.preload import named
from flowmesh.processes.protocol import MAX_MESSAGE, Fork, fork_decoder

SPARE = "flowmesh-spare"
"""The name of a child that waits for its task."""

EXIT_SETUP = 70
"""The child could not be set up, or its entry raised: an error of the node's, not of the task's (EX_SOFTWARE)."""


class Start(msgspec.Struct, frozen=True):
    """What a child has from its fork server."""

    orders: socket.socket
    """One datagram comes here: its task. Closed without one: there is none."""
    pipe: Pipe
    leaf: Leaf | None
    parent: int
    rehearsal: str | None = None
    """`module:function` to call while it waits."""


def run(start: Start) -> int:
    """Wait for a task, become the child that it describes, and do its work; returns the exit status."""
    linux.set_name(SPARE)
    refusal = None
    try:
        limits.enter(start.leaf, start.parent)
        reseed()
        if start.rehearsal is not None:
            named(start.rehearsal)()
    except Exception as error:  # noqa: BLE001 - told in its task's log, once it has one
        refusal = error
    order = start.orders.recv(MAX_MESSAGE)
    start.orders.close()
    if not order:
        return 0
    request = fork_decoder.decode(order)
    _redirect(request)
    if refusal is not None:
        raise refusal
    linux.set_name("flowmesh-task")
    limits.apply(request.limits, start.parent)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    threads.use(request.threads)
    return int(named(request.target)(start.pipe, Path(request.spool)))


def report_crash() -> None:
    """The traceback of what ended the entry, into the child's own log."""
    traceback.print_exc()


def leave(status: int) -> NoReturn:
    """End now: without the interpreter's teardown, which costs a second with some libraries and can hang."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or the task closed it
            status = status or EXIT_SETUP
    os._exit(status)


def _redirect(request: Fork) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = _open_log(request.stdout, request.limits)
    err = out if request.stderr == request.stdout else _open_log(request.stderr, request.limits)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target, inheritable=True)
    for fd in {null, out, err}:
        if fd > 2:
            os.close(fd)


def _open_log(path: str, wanted: limits.Limits) -> int:
    """While we are the node's user still: where we become another one, no link of its leads us elsewhere."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    if wanted.uid is None:
        return os.open(path, flags, 0o640)
    folder = linux.open_folder(Path(path).parent)
    try:
        return os.open(Path(path).name, flags, 0o640, dir_fd=folder)
    finally:
        os.close(folder)


def reseed() -> None:
    """Children of one server must not all draw the same numbers. Python's own generator sees to that by itself."""
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.seed()
