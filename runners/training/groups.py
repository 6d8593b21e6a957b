"""A group of ranks on one node: forked from the task's process, watched, and ended together.

A rank that fails ends the group within `GRACE_S`, and its own error is the group's; a rank never outlives the parent.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowmesh.messages.job import Fault
from runners.api import Cancelled, Context, RunnerError
from runners.gang import gang_of
from runners.training import ranks
from runners.training.devices import Layout
from runners.training.faults import is_echo
from runners.training.ranks import Place, Report

SETTLE_S = 1.0
"""From a rank's failure to the end of the others, so that the first failure can still be reported."""
GRACE_S = 2.0
"""From SIGTERM to SIGKILL."""
OTHERS_S = 3.0
"""From the loss of a rank on another node to the failure of this one, so that the other's own error is known before."""
TAIL_BYTES = 4096

Work = Callable[[Place, Context, socket.socket, int], dict[str, Any]]
"""A rank's work. Arguments: place, context, the store's socket (rank 0) and port."""


class RankFailed(RunnerError):
    """Raised when a rank failed, with its message and fault."""

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


def run(layout: Layout, ctx: Context, work: Work) -> list[Report]:
    """Fork the ranks, wait for all, and return their reports in order.

    Only in a process with one thread and no CUDA context.

    Raises:
        RankFailed: a rank failed; with its own message, fault and traceback.
        Cancelled: the node asked the task to stop.
    """
    folder = reports_dir(ctx)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0), backlog=layout.ranks) as listener:
        members: list[Member] = []
        with _ended_together(members):
            for rank in range(layout.ranks):
                members.append(_fork(rank, layout, ctx, listener, work))
            _wait(members)
    return verdict(ctx, folder, [Ending(m.rank, m.status or 0, m.ended_by_us) for m in members])


def reports_dir(ctx: Context) -> Path:
    return ctx.tmp_dir / "ranks"


class Ending(NamedTuple):
    """How a rank of this node ended, as its parent saw it."""

    local_rank: int
    status: int
    """Exit code, or minus the signal."""
    ended_by_us: bool


class Member:
    """A running rank as its parent sees it."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self.pid = pid
        self.handle = os.pidfd_open(pid)
        self.status: int | None = None
        """As in Ending; None while it runs."""
        self.ended_by_us = False

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, number)

    def reap(self) -> None:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.handle)


def _fork(rank: int, layout: Layout, ctx: Context, listener: socket.socket, work: Work) -> Member:
    parent = os.getpid()
    port = listener.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Member(rank, pid)
    try:
        ranks.die_with_parent(parent)
        ranks.redirect(ctx.out_dir / "logs" / str(rank))
        place = Place(rank=rank, local_rank=rank, world=layout.ranks, local_world=layout.ranks)
        os.environ.update(environment(place, port, ctx))
        own = ctx if rank == 0 else Context(ctx.job)  # only rank 0 has the task's pipe
        ranks.serve(place, own, reports_dir(ctx), lambda place, ctx: work(place, ctx, listener, port))
    finally:
        os._exit(70)


def environment(place: Place, port: int, ctx: Context) -> dict[str, str]:
    """torchrun's variables, and this rank's share of threads."""
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(ranks.threads(ctx, place)),
        "GLOO_SOCKET_IFNAME": "lo",  # the machine's own name may not resolve
    }


def _wait(members: list[Member]) -> None:
    """Wait until all ranks have exited with 0, or SETTLE_S after the first failure."""
    deadline: float | None = None
    while running := [member for member in members if member.status is None]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        for member in _ended(running, left):
            member.reap()
            if member.status != 0 and deadline is None:
                deadline = time.monotonic() + SETTLE_S


def _ended(running: list[Member], timeout_s: float | None) -> list[Member]:
    poller = select.poll()
    for member in running:
        poller.register(member.handle, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(None if timeout_s is None else max(timeout_s, 0) * 1000)}
    return [member for member in running if member.handle in ready]


@contextlib.contextmanager
def _ended_together(members: list[Member]) -> Iterator[None]:
    """End all ranks when the block is left."""
    try:
        yield
    finally:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt this
        try:
            _end(members)
        finally:
            signal.signal(signal.SIGTERM, before)


def _end(members: list[Member]) -> None:
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        deadline = None if patience_s is None else time.monotonic() + patience_s
        for member in members:
            if member.status is None:
                member.ended_by_us = True
                member.signal(number)
        while running := [member for member in members if member.status is None]:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            for member in _ended(running, left):
                member.reap()


def verdict(ctx: Context, folder: Path, endings: list[Ending]) -> list[Report]:
    """All reports if every rank succeeded; else raises the error of the rank that caused the failure."""
    reports = {ending.local_rank: ranks.read_report(folder, ending.local_rank) for ending in endings}
    found = [report for report in reports.values() if report is not None]
    if len(found) == len(endings) and all(report.ok for report in found):
        return found
    culprit = blame(found)
    dead = [each for each in endings if reports[each.local_rank] is None and not each.ended_by_us]
    if dead and (culprit is None or _order(culprit)[0] > SILENT):
        raise _failed(ctx, dead[0].local_rank, f"rank {dead[0].local_rank} {_words(dead[0].status)}", Fault.CRASH, "")
    assert culprit is not None, "a rank that did not succeed has reported or died"
    if culprit.fault is Fault.CANCELLED and culprit.message != ranks.TERMINATED:
        raise Cancelled(culprit.message, checkpoint=culprit.checkpoint)
    fault = Fault.ERROR if culprit.fault in (None, Fault.CANCELLED) else culprit.fault
    local_rank = next(local for local, report in reports.items() if report is culprit)
    message = (
        culprit.message
        if fault in (Fault.BAD_REQUEST, Fault.MISSING_DEPENDENCY)
        else f"rank {culprit.rank}: {culprit.message}"
    )
    if _order(culprit)[0] == ECHO:
        message += _still_at_work(endings, reports)
        if gang_of(ctx) is not None:
            ctx.sleep(OTHERS_S)
            fault = Fault.CRASH  # of another node, so that a retry makes sense
    raise _failed(ctx, local_rank, message, fault, culprit.detail)


OWN, CANCELLED, SILENT, ECHO, TERMINATED = range(5)
"""Order of failures by nearness to the cause: own error, cancel, exit without a report, lost peer, our SIGTERM."""


def blame(reports: list[Report]) -> Report | None:
    """The failed report nearest to the cause; the earliest of several."""
    return min((report for report in reports if not report.ok), key=_order, default=None)


def _order(report: Report) -> tuple[int, float]:
    if report.fault is Fault.CANCELLED:
        # Rank 0 has the pipe, and so the reason.
        return (TERMINATED, report.when) if report.message == ranks.TERMINATED else (CANCELLED, report.rank)
    return ECHO if report.fault is Fault.ERROR and is_echo(report.message) else OWN, report.when


def _still_at_work(endings: list[Ending], reports: dict[int, Report | None]) -> str:
    """Names the ranks that others may have waited for."""
    ended = [each.local_rank for each in endings if each.ended_by_us]
    silent = [rank for rank in ended if (report := reports[rank]) is None or report.message == ranks.TERMINATED]
    names = ", ".join(map(str, silent))
    return f"; still at work: rank {names} (where, is at the end of its logs/<rank>/stderr.log)" if silent else ""


def _words(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status} and left no report"


def _failed(ctx: Context, local_rank: int, message: str, fault: Fault, detail: str) -> RankFailed:
    error = RankFailed(message, fault)
    log = Path("logs", str(local_rank), "stderr.log")
    error.add_note(detail or f"the end of {log}:\n{_tail(ctx.out_dir / log)}")
    return error


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"({error})"
