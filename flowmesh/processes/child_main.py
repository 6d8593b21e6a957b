"""What a fork server's child runs: it waits for its task, sets up limits, logs and environment, and runs the task."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.files.safe_folder import open_folder
from flowmesh.messages.job import EXIT_SETUP
from flowmesh.processes import limits, linux, threads, title
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.preload import named
from flowmesh.processes.protocol import MAX_MESSAGE, Fork, SetUp, Unready, encode, fork_decoder

SPARE = "flowmesh-spare"
"""Process name of a child that waits for its task."""


class Start(msgspec.Struct, frozen=True):
    """What a child gets from its fork server."""

    orders: socket.socket
    """Receives one datagram, the child's Fork request. Closed without one if there is no task for it.

    The child answers with a SetUp or an Unready, and closes it."""
    pipe: Pipe
    """The child's end."""
    leaf: Leaf | None
    """The cgroup that it joins."""
    parent: int
    """The fork server's pid."""
    rehearsal: str | None = None
    """`module:function` that it calls before it waits for its task."""


def run(start: Start) -> int:
    """Wait for a Fork request, apply it to this process, and call its target.

    Returns:
        the exit status; 0 if no request came.

    Raises:
        Exception: the child could not be set up, or the target raised. Its log exists by then.
    """
    linux.set_name(SPARE)
    failure = None
    try:
        limits.enter(start.leaf, start.parent)
        reseed()
        if start.rehearsal is not None:
            named(start.rehearsal)()
    except Exception as error:  # noqa: BLE001 - raised below, once the child has its task's log
        failure = error
    order = start.orders.recv(MAX_MESSAGE)
    if not order:
        return 0
    own = False
    try:
        request = fork_decoder.decode(order)
        own = failure is None
        _redirect(request)
        own = False
        if failure is not None:
            raise failure
        target = _set_up(request, start.parent)
    except Exception as error:
        _say(start.orders, Unready(message=_reason(error), own=own))
        raise
    _say(start.orders, SetUp())
    start.orders.close()
    return int(target(start.pipe, Path(request.spool)))


def _say(orders: socket.socket, what: SetUp | Unready) -> None:
    with contextlib.suppress(OSError):  # the fork server has died, and this process dies with it
        orders.send(encode(what), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _set_up(request: Fork, parent: int) -> Callable[[Pipe, Path], int]:
    """Limits, folder and environment of the task; returns what it calls."""
    linux.set_name("flowmesh-task")
    if request.task_id:
        title.show_task(request.task_id)
    limits.apply(request.limits, parent)
    _enter_folder(request)
    _use_environ(request.env)
    threads.use(request.threads)
    with os.scandir(request.spool):  # raises if it is gone
        pass
    target: Callable[[Pipe, Path], int] = named(request.target)
    return target


def _use_environ(env: dict[str, str]) -> None:
    """Replace this process's environment. What stays the same is not touched: most of it is the fork server's."""
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return f"its process could not be set up: {text}"


def nothing(_pipe: Pipe, _spool: Path) -> int:
    """The target of a child that only shows that children can be forked."""
    return 0


def _enter_folder(request: Fork) -> None:
    """Its work folder; its temporary one if the node's start folder was deleted, which is no reason to run nothing."""
    try:
        os.chdir(request.cwd)
    except OSError as error:
        sys.stderr.write(f"the node's start folder {request.cwd} cannot be entered ({error.strerror}): in TMPDIR\n")
        os.chdir(request.env.get("TMPDIR", "/"))


def report_crash() -> None:
    """Write the traceback of the current exception to the child's log."""
    traceback.print_exc()


def leave(status: int) -> NoReturn:
    """Exit without the interpreter's teardown, which takes a second with some libraries and can hang.

    Args:
        status: EXIT_SETUP instead of 0 if the last output cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the disk is full, or the task closed the stream
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


def _open_log(path: str, requested: limits.Limits) -> int:
    """Open a log, still as the node's user. If the task runs as another user, no link in its path is followed.

    That user owns the log's folder, and could otherwise make the node's user write elsewhere, also by a hard link or a
    pipe in the log's place.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    if requested.uid is None:
        return os.open(path, flags, 0o640)
    folder = open_folder(Path(path).parent)
    name = Path(path).name
    try:
        opened = _open_regular(name, flags, folder)
        if opened is None:
            os.unlink(name, dir_fd=folder)
            opened = os.open(name, flags | os.O_EXCL, 0o640, dir_fd=folder)
        return opened
    finally:
        os.close(folder)


def _open_regular(name: str, flags: int, folder: int) -> int | None:
    """Open or make a file; None where its place has a link, a pipe, or another name of somebody's file."""
    try:
        opened = os.open(name, flags | os.O_NONBLOCK, 0o640, dir_fd=folder)  # does not wait for a pipe's other end
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):
            return None
        raise
    found = os.fstat(opened)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        os.set_blocking(opened, True)
        return opened
    os.close(opened)
    return None


def reseed() -> None:
    """Seed the generators of numpy and torch: otherwise all children of a server draw the same numbers.

    Python's own generator is reseeded after a fork by itself.
    """
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.seed()
