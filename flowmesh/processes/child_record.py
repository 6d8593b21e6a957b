"""What a fork server knows of a child: before it has a task (Spare), and afterwards (Entry)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

import msgspec

from flowmesh.messages.job import Exit
from flowmesh.processes import cgroup
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import MAX_MESSAGE, Fork, SetUp, Unready, set_up_decoder

_LEAF_S = 1.0


class Spare:
    """A child forked ahead: it has its own session and cgroup, and waits for its task.

    So no task waits for the fork of a process with large libraries (milliseconds), nor for the move into a cgroup,
    which takes an RCU grace period of the kernel (measured: 11 ms median; under 1 ms only right after another move).
    """

    def __init__(self, pid: int, pipe: Pipe, orders: socket.socket, leaf: Leaf | None) -> None:
        self.pid = pid
        self.pipe = pipe
        self.leaf = leaf
        self.orders = orders

    def take(self, request: Fork, data: bytes) -> Entry:
        """Send it its task.

        Args:
            data: the request as a message.

        Raises:
            OSError: it has died, or a limit cannot be set; it cannot be used then.
        """
        if self.leaf is not None:
            limits = request.limits
            self.leaf.limit(memory_max_bytes=limits.memory_max_bytes, pids_max=limits.pids_max)
            if limits.uid is not None:
                with contextlib.suppress(OSError):  # it does without
                    self.leaf.delegate(limits.uid, -1 if limits.gid is None else limits.gid)
        self.orders.send(data, socket.MSG_NOSIGNAL)
        return Entry(self, request, data)

    @property
    def descriptors(self) -> tuple[int, int]:
        """The fork server's descriptors for it, which another child closes."""
        return self.orders.fileno(), self.pipe.fileno()

    def discard(self, *, reaped: bool = False) -> None:
        """Kill it. Takes a second at most.

        Args:
            reaped: it has ended and was waited for; its pid may belong to another process by now.
        """
        self.orders.close()
        self.pipe.close()
        if not reaped:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.leaf is not None:
            self.leaf.remove_within(_LEAF_S)


class Entry:
    """One child with a task, until Forget."""

    def __init__(self, spare: Spare, request: Fork, data: bytes) -> None:
        """
        Args:
            data: the request as it came.
        """
        self.request = request
        self.data = data
        self.orders: socket.socket | None = spare.orders
        """Where it says whether it could be set up; None: that is known."""
        self.unready: Unready | None = None
        """Why it could not."""
        self.begun = False
        """Whether it may have done something of its task: it was set up, or was given no more time for it."""
        self.second = False
        """Whether another child had this task before, and died before it had begun."""
        self.asked_to_end = False
        """Whether the supervisor has sent it SIGTERM."""
        self.attempt = request.attempt
        self.pid = spare.pid
        self.pipe = spare.pipe
        self.leaf = spare.leaf
        self.killed_by_us = False
        self.forked_at = time.monotonic()
        self.near_oom_kills = 0
        self.ended_at: float | None = None
        self.swept = 0
        self.exit: Exit | None = None
        self.gone = False

    def note_kills(self) -> None:
        """Note how many OOM kills there were so far, if the kernel does not count them for this child alone."""
        if self.leaf is None or self.leaf.oom_kills() is None:
            self.near_oom_kills = cgroup.oom_kills_near()

    @property
    def running(self) -> bool:
        return self.ended_at is None

    def read_orders(self) -> None:
        """Note what it says of its set-up. One that died in it says nothing."""
        assert self.orders is not None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            match set_up_decoder.decode(self.orders.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)):
                case SetUp():
                    self.begun = True
                case Unready() as unready:
                    self.unready = unready

    def close_orders(self) -> None:
        if self.orders is not None:
            self.orders.close()
            self.orders = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The fork server's descriptors for it, which another child closes."""
        return (self.pipe.fileno(),) if self.orders is None else (self.pipe.fileno(), self.orders.fileno())

    def close(self) -> None:
        """Close its descriptors."""
        self.pipe.close()
        self.close_orders()
