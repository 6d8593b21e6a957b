"""A fork server: a process of one Python environment that has imported its libraries, and forks a child for each task.

It has one thread and no GPU context, so a fork of it is a whole process. It is the parent and the reaper of its
children: it knows how they ended, it keeps them when its supervisor goes away, and says "gone" only when
nothing of a child's tree is left. When it dies, its children die with it.
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
from collections import deque
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.messages.job import Exit
from flowmesh.processes import cgroup, child_main, linux, preload, tree
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
    Reply,
    Retire,
    Terminate,
    Unfit,
    encode,
    request_decoder,
)
from flowmesh.processes.spares import QUIET_S, Ahead

SWEEP_INTERVAL_S = 0.002
SWEEP_LIMIT_S = 5.0
"""After this a tree that does not go (a process stuck in the kernel) is reported with what is left of it."""
ORPHAN_EXIT = 3
"""Exit status of a fork server whose supervisor did not come back."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor starts it with, as JSON in its one argument."""

    socket: str
    """Path that its listening socket is bound to; removed when it ends."""
    fd: int
    """The listening socket itself, inherited: a supervisor can connect before the first line of ours has run."""
    preload: tuple[str, ...] = ()
    canary: str | None = None
    """`module:function` that a first child runs before any task does."""
    rehearsal: str | None = None
    """`module:function` that each child calls while it waits for its task."""
    adoption_timeout_s: float = 60.0
    cgroup: str | None = None
    """The folder in which each child gets a leaf; None: they get none."""
    made_of: str = ""
    """Said again to each supervisor: one whose settings have changed wants another server for its next tasks."""


class ForkServer:
    """Serves one supervisor at a time until it is retired, or none comes back in time."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.entries: dict[int, Entry] = {}
        self.by_pid: dict[int, Entry] = {}
        self.ahead = Ahead(self._fork)
        self.leaves = 0
        self.emptied: list[tuple[Leaf, float]] = []
        """Nobody is in them any more, and they are to be removed; until when to try."""
        self.supervisor: socket.socket | None = None
        self.outgoing: deque[tuple[bytes, list[int]]] = deque()
        self.retiring = False
        self.alone_since = time.monotonic()
        self.ready: Ready | None = None
        self.listener = socket.socket(fileno=options.fd)
        self.listener.setblocking(False)
        os.set_inheritable(options.fd, False)
        self.wakeup_read, self.wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.poller = select.epoll()
        self.poller.register(self.listener, select.EPOLLIN)
        self.poller.register(self.wakeup_read, select.EPOLLIN)

    # ---- life --------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        linux.set_name("flowmesh-forksrv")
        linux.become_subreaper()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wakeup descriptor does the work
        signal.set_wakeup_fd(self.wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        report = preload.load(self.options.preload, self.options.canary)
        if report.problem:
            self._refuse(Unfit(message=report.problem, unsafe=report.unsafe))
            return 1
        gc.collect()
        gc.freeze()
        self.alone_since = time.monotonic()  # while it imported, nobody could have come
        self.ready = Ready(
            version=VERSION,
            pid=os.getpid(),
            preload_s=report.seconds,
            modules=report.modules,
            rss_bytes=report.rss_bytes,
            packages=report.packages,
            stamp=preload.stamp(report.packages),
            made_of=self.options.made_of,
        )
        try:
            self.ahead.look(quiet=True)
            while not self._finished():
                self._turn()
            return 0 if self.supervisor is not None or self.retiring else ORPHAN_EXIT
        finally:
            self.ahead.drop()
            for leaf, until_s in self.emptied:
                leaf.remove_within(until_s - time.monotonic())
            Path(self.options.socket).unlink(missing_ok=True)

    def _finished(self) -> bool:
        if self.retiring and not self.entries:
            return True
        if self.supervisor is None and time.monotonic() - self.alone_since > self.options.adoption_timeout_s:
            for entry in self.entries.values():
                self._kill(entry)
            return not any(not entry.gone for entry in self.entries.values())
        return False

    def _turn(self) -> None:
        sweeping = bool(self.emptied) or any(not entry.running and not entry.gone for entry in self.entries.values())
        lacking = self.ahead.lacking and not self.retiring
        happened = self.poller.poll(SWEEP_INTERVAL_S if sweeping else QUIET_S if lacking else 1.0)
        if lacking:
            self.ahead.look(quiet=not happened and not sweeping)
        for fd, events in happened:
            if fd == self.wakeup_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wakeup_read, 4096)
            elif fd == self.listener.fileno():
                self._accept()
            elif self.supervisor is not None and fd == self.supervisor.fileno():
                if events & select.EPOLLOUT:
                    self._flush()
                if events & ~select.EPOLLOUT:
                    self._receive()
        self._reap()
        self._sweep()

    def _refuse(self, reply: Unfit) -> None:
        """Tell the first supervisor that asks within the adoption timeout, and end."""
        self.listener.setblocking(True)
        self.listener.settimeout(self.options.adoption_timeout_s)
        with contextlib.suppress(OSError):
            supervisor, _ = self.listener.accept()
            supervisor.send(encode(reply), socket.MSG_NOSIGNAL)
        Path(self.options.socket).unlink(missing_ok=True)

    # ---- the supervisor ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            supervisor, _ = self.listener.accept()
        except OSError:
            return
        self._drop_supervisor()  # the newest one is it: an older one is dead or about to be
        supervisor.setblocking(False)
        supervisor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)
        self.supervisor = supervisor
        self.poller.register(supervisor, select.EPOLLIN)
        assert self.ready is not None
        self._say(msgspec.structs.replace(self.ready, attempts=tuple(self.entries), retiring=self.retiring))
        for entry in self.entries.values():
            self._say_forked(entry)
            if entry.gone:
                self._say_gone(entry)

    def _drop_supervisor(self) -> None:
        if self.supervisor is not None:
            self.poller.unregister(self.supervisor)
            self.supervisor.close()
            self.supervisor = None
            self.outgoing.clear()
            self.alone_since = time.monotonic()

    def _receive(self) -> None:
        assert self.supervisor is not None
        try:
            data = self.supervisor.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop_supervisor()
            return
        try:
            request = request_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # another version's: no reason to end any task
            sys.stderr.write(f"a request that this fork server does not have: {error}\n")
            sys.stderr.flush()
            return
        match request:
            case Fork():
                self._start(request, data)
            case Terminate(attempt):
                if (entry := self.entries.get(attempt)) and entry.running:
                    tree.send_group(entry.pid, signal.SIGTERM)
            case Kill(attempt):
                if entry := self.entries.get(attempt):
                    self._kill(entry)
            case Forget(attempt):
                if (entry := self.entries.get(attempt)) and entry.gone:
                    entry.pipe.close()
                    del self.entries[attempt]
            case Retire():
                self.retiring = True
                self.ahead.drop()

    def _say(self, reply: Reply, fd: int | None = None) -> None:
        if self.supervisor is not None:
            self.outgoing.append((encode(reply), [] if fd is None else [fd]))
            self._flush()

    def _say_forked(self, entry: Entry) -> None:
        folder = None if entry.leaf is None else str(entry.leaf.path)
        self._say(Forked(attempt=entry.attempt, pid=entry.pid, cgroup=folder), entry.pipe.fileno())

    def _say_gone(self, entry: Entry) -> None:
        assert entry.exit is not None
        self._say(Gone(attempt=entry.attempt, exit=entry.exit))

    def _flush(self) -> None:
        assert self.supervisor is not None
        while self.outgoing:
            data, fds = self.outgoing[0]
            try:
                socket.send_fds(self.supervisor, [data], fds, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self.poller.modify(self.supervisor, select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._drop_supervisor()
                return
            self.outgoing.popleft()
        self.poller.modify(self.supervisor, select.EPOLLIN)

    # ---- children ----------------------------------------------------------------------------------------------------

    def _start(self, request: Fork, data: bytes) -> None:
        if request.attempt in self.entries:
            self._say(ForkFailed(attempt=request.attempt, message="this attempt already has a process"))
            return
        try:
            entry = self.ahead.hand_out(request, data)
        except OSError as error:
            at = f" ({error.filename})" if error.filename else ""
            self._say(ForkFailed(attempt=request.attempt, message=f"fork: {error.strerror}{at}"))
            return
        self.entries[request.attempt] = self.by_pid[entry.pid] = entry
        self._say_forked(entry)
        entry.note_kills()

    def _fork(self) -> Spare:
        """A child that waits to be told its task.

        Raises:
            OSError: there cannot be one now.
        """
        leaf = self._make_leaf()
        near, far = Pipe.pair()
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        me = os.getpid()
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
            near.close()
            orders.close()
            self._become_child(child_main.Start(theirs, far, leaf, me, self.options.rehearsal))
        far.close()
        theirs.close()
        orders.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
        return Spare(pid, near, orders, leaf)

    def _make_leaf(self) -> Leaf | None:
        if self.options.cgroup is None:
            return None
        self.leaves += 1
        return Leaf.make(Path(self.options.cgroup), f"{Path(self.options.socket).stem}.{self.leaves}")

    def _become_child(self, start: child_main.Start) -> NoReturn:
        """In the child: let go of all that is the server's, then never come back."""
        status = child_main.EXIT_SETUP
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self.listener.close()
            self.poller.close()
            os.close(self.wakeup_read)
            os.close(self.wakeup_write)
            if self.supervisor is not None:
                self.supervisor.close()
            for entry in self.entries.values():
                entry.pipe.close()
            self.ahead.close()
            status = child_main.run(start)
        except BaseException:  # noqa: BLE001 - the boundary of the process: told in its log, and by its exit status
            child_main.report_crash()
        finally:
            child_main.leave(status)

    def _kill(self, entry: Entry) -> None:
        entry.killed_by_us = True
        if entry.leaf is not None:
            entry.leaf.kill()
        if entry.running:
            tree.send(entry.pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ahead.reaped(pid)
            entry = self.by_pid.pop(pid, None)
            if entry is None:
                continue  # an orphan of a task's, swept
            entry.ended_at = time.monotonic()
            killed = os.WIFSIGNALED(status)
            entry.exit = Exit(
                code=None if killed else os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status) if killed else None,
                oom_kills=self._oom_kills(entry, killed and os.WTERMSIG(status) == signal.SIGKILL),
                ran_s=entry.ended_at - entry.forked_at,
                user_cpu_s=usage.ru_utime,
                system_cpu_s=usage.ru_stime,
                peak_rss_bytes=usage.ru_maxrss * 1024,
            )

    @staticmethod
    def _oom_kills(entry: Entry, killed: bool) -> int:
        """The kernel's count for this child alone; where it counts others with it, only a kill not ours is evidence."""
        if entry.leaf is not None and (kills := entry.leaf.oom_kills()) is not None:
            return kills
        if killed and not entry.killed_by_us:
            return cgroup.oom_kills_near() - entry.near_oom_kills
        return 0

    def _sweep(self) -> None:
        """Kill what ended children left behind; say Gone for those of whom nothing is left.

        A task's first process is a subreaper, so a child of ours that we did not fork can only be what an ended task
        left (or what a task sent away on purpose, which ends the same way).
        """
        ending = [entry for entry in self.entries.values() if not entry.running and not entry.gone]
        orphans = self._orphans()
        if orphans:
            tree.kill_all(orphans)
            self._reap()
        for entry in ending:
            entry.swept += len(orphans)
            self._settle(entry, self._orphans() if orphans else [])
        now = time.monotonic()
        self.emptied = [(leaf, until_s) for leaf, until_s in self.emptied if not leaf.remove() and now < until_s]

    def _orphans(self) -> list[int]:
        """Processes below us that neither we forked nor any child of ours that runs."""
        own = self.by_pid.keys() | self.ahead.pids
        if own.issuperset(linux.own_children()):
            return []
        return tree.descendants(os.getpid(), besides=own)

    def _settle(self, entry: Entry, left: list[int]) -> None:
        assert entry.ended_at is not None
        assert entry.exit is not None
        if entry.leaf is not None and entry.leaf.populated():
            inside = entry.leaf.pids()
            entry.swept += len(set(inside) - set(left))
            entry.leaf.kill()
            left += inside
        for_s = time.monotonic() - entry.ended_at
        if left and for_s < SWEEP_LIMIT_S:
            return
        entry.exit = msgspec.structs.replace(
            entry.exit, swept=entry.swept, left=len(set(left)), gone_ms=round(for_s * 1000, 3)
        )
        entry.gone = True
        self._say_gone(entry)
        if entry.leaf is not None:
            self.emptied.append((entry.leaf, time.monotonic() + SWEEP_LIMIT_S))


def main() -> int:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    return ForkServer(options).run()


if __name__ == "__main__":
    sys.exit(main())
