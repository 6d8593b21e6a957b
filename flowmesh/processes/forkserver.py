"""A fork server: a process of one environment that has imported its libraries, and forks a child for each task.

It has one thread and no GPU context, so its forks are safe. It is the parent and subreaper of its children: it has
their exit statuses, keeps them while there is no supervisor, and reports Gone only when nothing of a child's tree is
left. When it dies, its children die with it (PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.messages.job import EXIT_SETUP
from flowmesh.processes import child_main, linux, preload, title, tree
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.child_record import Entry, Spare
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import (
    MAX_MESSAGE,
    VERSION,
    Forget,
    Fork,
    Forked,
    ForkFailed,
    Gone,
    Kill,
    Ready,
    Request,
    Retire,
    Terminate,
    Unfit,
)
from flowmesh.processes.reaper import Reaper
from flowmesh.processes.spares import Spares
from flowmesh.processes.supervisor_connection import SupervisorConnection

SWEEP_INTERVAL_S = 0.002
IDLE_S = 1.0
SOCKET_INTERVAL_S = 1.0
SET_UP_S = 2.0
"""A child that has not said within this time whether it could be set up counts as forked."""
ORPHAN_EXIT = 3
"""Exit status of a fork server that no supervisor adopted in time."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor starts it with: JSON, its only argument."""

    socket: str
    """Path of its listening socket; removed when it ends."""
    fd: int
    """The listening socket, inherited: the supervisor can connect before this process has run a line."""
    preload: tuple[str, ...] = ()
    canary: str | None = None
    """`module:function` that a first child must run without error before the server takes tasks."""
    prepare: str | None = None
    """`module:function` that the server calls once, after its imports."""
    rehearsal: str | None = None
    """`module:function` that each child calls while it waits for its task."""
    adoption_timeout_s: float = 60.0
    cgroup: str | None = None
    """The folder in which each child gets a cgroup; None: they get none."""
    nice: int = 0
    """How much nicer than the supervisor the imports are; what it forks for tasks is not."""
    hidden: bool = False
    """Whether processes of the same user are kept from reading its memory, and so that of its children: they are given
    secrets."""
    made_of: str = ""
    """Sent back to each supervisor: one whose settings have changed starts another server for its next tasks."""


class ForkServer:
    """Serves one supervisor at a time until it is retired, or until none adopts it in time."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._path = Path(options.socket)
        self._cgroup = None if options.cgroup is None else Path(options.cgroup)
        self._spares = Spares(self._fork, self._is_awaited)
        self._reaper = Reaper(self._spares, self._send_gone)
        self._in_set_up: dict[int, Entry] = {}
        """The children that have not said yet whether they could be set up, by descriptor."""
        self._leaves = 0
        self._retiring = False
        self._ready: Ready | None = None
        self._looked_at = 0.0
        """When the socket was last looked for, monotonic."""
        self._listener = socket.socket(fileno=options.fd)
        self._listener.setblocking(False)
        os.set_inheritable(options.fd, False)
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = select.epoll()
        self._poller.register(self._listener, select.EPOLLIN)
        self._poller.register(self._wakeup_read, select.EPOLLIN)
        self._supervisor = SupervisorConnection(self._listener, self._poller)

    def run(self) -> int:
        linux.set_name("flowmesh-forksrv")
        if self._options.hidden:
            linux.hide_from_same_user()
        linux.become_subreaper()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it only writes to the wakeup descriptor
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        title.arguments()
        report = self._load()
        if report.problem:
            self._supervisor.refuse(
                Unfit(message=report.problem, unsafe=report.unsafe), self._options.adoption_timeout_s
            )
            self._remove_socket()
            return 1
        gc.collect()
        gc.freeze()
        self._supervisor.begin()  # nobody could connect during the imports
        self._ready = Ready(
            version=VERSION,
            pid=os.getpid(),
            preload_s=report.seconds,
            modules=report.modules,
            rss_bytes=report.rss_bytes,
            packages=report.packages,
            stamp=preload.stamp(report.packages),
            made_of=self._options.made_of,
        )
        try:
            self._spares.look(idle=True, quiet=True)
            while not self._finished():
                self._turn()
            return 0 if self._supervisor.connected or self._retiring else ORPHAN_EXIT
        finally:
            self._spares.drop()
            self._reaper.close()
            self._remove_socket()

    def _load(self) -> preload.Report:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        if self._options.nice:
            os.nice(self._options.nice)
        gc.disable()  # what is imported stays: looking through it again and again is a fifth of the time
        try:
            return preload.load(self._options.preload, self._options.canary, self._options.prepare)
        finally:
            gc.enable()
            if self._options.nice:
                os.setpriority(os.PRIO_PROCESS, 0, own)

    def _keep_socket(self) -> None:
        """Listen at our path again if somebody has deleted the socket there: the next supervisor looks for it."""
        path, now = self._path, time.monotonic()
        if now - self._looked_at < SOCKET_INTERVAL_S or self._retiring:
            return
        self._looked_at = now
        if path.exists():
            return
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fresh.bind(str(path))
            fresh.listen(4)
        except OSError:
            fresh.close()  # tried again
            return
        fresh.setblocking(False)
        if self._supervisor.accept():  # one that has connected to the old socket meanwhile
            self._introduce()
        self._poller.unregister(self._listener)
        self._listener.close()
        self._listener = fresh
        self._poller.register(fresh, select.EPOLLIN)
        self._supervisor.listen_at(fresh)

    def _remove_socket(self) -> None:
        self._path.unlink(missing_ok=True)

    def _finished(self) -> bool:
        if self._retiring and not self._reaper:
            return True
        if self._supervisor.alone_s > self._options.adoption_timeout_s:
            for entry in self._reaper:
                self._reaper.kill(entry)
            return self._reaper.all_gone
        return False

    def _turn(self) -> None:
        sweeping = self._reaper.sweeping
        pause_s = None if self._retiring else self._spares.pause_s
        happened = self._poller.poll(SWEEP_INTERVAL_S if sweeping else IDLE_S if pause_s is None else pause_s)
        self._keep_socket()
        for fd, events in happened:
            if fd == self._wakeup_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup_read, 4096)
            elif (entry := self._in_set_up.get(fd)) is not None:
                self._was_set_up(entry)
            elif fd == self._listener.fileno():
                if self._supervisor.accept():
                    self._introduce()
            elif self._supervisor.is_for(fd):
                if events & select.EPOLLOUT:
                    self._supervisor.flush()
                if events & ~select.EPOLLOUT and self._supervisor.is_for(fd) and (got := self._supervisor.receive()):
                    self._handle(*got)
        self._announce_late()
        if self._reaper.reap() or self._reaper.sweeping or not happened:
            self._reaper.sweep()
        if not self._retiring:
            self._spares.look(idle=self._reaper.all_gone, quiet=not happened and not sweeping)

    def _is_awaited(self) -> bool:
        return bool(self._poller.poll(0))

    def _introduce(self) -> None:
        """Tell a supervisor that has connected what this server is, and which children it has."""
        assert self._ready is not None, "nobody is accepted before the imports are done"
        ready = msgspec.structs.replace(self._ready, attempts=self._reaper.attempts, retiring=self._retiring)
        self._supervisor.send(ready)
        for entry in list(self._reaper):
            if entry.begun or entry.orders is not None:
                self._announce(entry)
            if entry.gone:
                self._send_gone(entry)

    def _handle(self, request: Request, data: bytes) -> None:
        match request:
            case Fork():
                self._start(request, data)
            case Terminate(attempt):
                if entry := self._reaper.get(attempt):
                    entry.asked_to_end = True
                    if entry.running:
                        tree.send_group(entry.pid, signal.SIGTERM)
            case Kill(attempt):
                if entry := self._reaper.get(attempt):
                    self._reaper.kill(entry)
            case Forget(attempt):
                self._reaper.forget(attempt)
            case Retire():
                self._retiring = True
                self._spares.drop()

    def _was_set_up(self, entry: Entry) -> None:
        """A child has said whether it could be set up, or has died. Then it is reported when nothing is left of it."""
        entry.read_orders()
        if entry.begun:
            self._announce(entry)
        else:
            self._end_set_up(entry)

    def _announce_late(self) -> None:
        now = time.monotonic()
        for entry in [each for each in self._in_set_up.values() if now - each.forked_at > SET_UP_S]:
            self._announce(entry)

    def _end_set_up(self, entry: Entry) -> None:
        if entry.orders is not None:
            del self._in_set_up[entry.orders.fileno()]
            self._poller.unregister(entry.orders)
            entry.close_orders()

    def _announce(self, entry: Entry) -> None:
        self._end_set_up(entry)
        entry.begun = True
        folder = None if entry.leaf is None else str(entry.leaf.path)
        self._supervisor.send(Forked(attempt=entry.attempt, pid=entry.pid, cgroup=folder), entry.pipe.fileno())

    def _send_gone(self, entry: Entry) -> None:
        assert entry.exit is not None
        if entry.orders is not None:  # it died in its set-up
            self._was_set_up(entry)
        if entry.unready is not None:
            unready = entry.unready
            self._supervisor.send(ForkFailed(attempt=entry.attempt, message=unready.message, own=unready.own))
            self._reaper.forget(entry.attempt)
            return
        if not entry.begun:
            if not (entry.asked_to_end or entry.killed_by_us or entry.exit.oom_kills or entry.second):
                self._reaper.forget(entry.attempt)
                self._start(entry.request, entry.data, second=True)
                return
            self._announce(entry)
        self._supervisor.send(Gone(attempt=entry.attempt, exit=entry.exit))

    def _start(self, request: Fork, data: bytes, *, second: bool = False) -> None:
        """Give a spare child its task.

        Args:
            data: the request as it came, which the child gets as it is.
            second: to a new child, as the first one died before it had begun: somebody kills processes that wait.
        """
        attempt = request.attempt
        if self._reaper.get(attempt) is not None:
            self._supervisor.send(ForkFailed(attempt=attempt, message="this attempt already has a process"))
            return
        try:
            entry = self._spares.hand_out(request, data, new=second)
        except OSError as error:
            at = f" ({error.filename})" if error.filename else ""
            self._supervisor.send(ForkFailed(attempt=attempt, message=f"fork: {error.strerror}{at}"))
            return
        entry.second = second
        self._reaper.add(entry)
        assert entry.orders is not None
        self._in_set_up[entry.orders.fileno()] = entry
        self._poller.register(entry.orders, select.EPOLLIN)
        entry.note_kills()

    def _fork(self) -> Spare:
        """Fork a child that waits for its task.

        Raises:
            OSError: it cannot be forked now.
        """
        leaf = self._make_leaf()
        near, far = Pipe.pair()
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        me, unused = os.getpid(), [near.fileno(), orders.fileno(), *self._descriptors()]
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            for each in (near, far, orders, theirs):
                each.close()
            if leaf is not None:
                leaf.remove()
            raise
        if pid == 0:
            _become_child(child_main.Start(theirs, far, leaf, me, self._options.rehearsal), unused)
        far.close()
        theirs.close()
        orders.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
        return Spare(pid, near, orders, leaf)

    def _make_leaf(self) -> Leaf | None:
        if self._cgroup is None:
            return None
        self._leaves += 1
        return Leaf.make(self._cgroup, f"{self._path.stem}.{self._leaves}")

    def _descriptors(self) -> list[int]:
        """What this server has open for itself and for its children."""
        children = [fd for entry in self._reaper for fd in entry.descriptors]
        own = (self._poller.fileno(), self._wakeup_read, self._wakeup_write)
        return [*own, *self._supervisor.descriptors, *self._spares.descriptors, *children]


def _become_child(start: child_main.Start, unused: list[int]) -> NoReturn:
    """In the child: close the server's descriptors, do the child's work, and exit.

    By number: each Python object that is used here costs a copy of the page of memory it is in. The server's objects
    are not used again in this process, which ends without the interpreter's teardown.
    """
    status = EXIT_SETUP
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for fd in unused:
            os.close(fd)
        status = child_main.run(start)
    except BaseException:  # noqa: BLE001 - the process boundary: reported in its log and by its exit status
        child_main.report_crash()
    finally:
        child_main.leave(status)


def main() -> int:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    return ForkServer(options).run()


if __name__ == "__main__":
    sys.exit(main())
