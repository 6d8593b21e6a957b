"""A group over several nodes: torchrun on each, as each node's own task; every rank is a `rank_process`.

The task's pipe reaches local rank 0 over a unix socket, since torchrun hands its ranks no descriptors.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from runners.api import Context, RunnerError
from runners.gang import interfaces
from runners.training import groups, ranks
from runners.training.devices import Layout
from runners.training.inputs import Inputs
from runners.training.plan import Plan
from runners.training.rank_order import ORDER_FILE, RANK_MODULE, SOCKET, Order
from runners.training.ranks import Report

LAUNCHER = "runners.training.rendezvous"
"""torchrun, which listens on the endpoint's address only."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


def run(plan: Plan, layout: Layout, ctx: Context, fetched: Inputs) -> list[Report]:
    """Run this node's part of the group; as `groups.run`.

    Raises:
        RankFailed: a rank of this node failed.
        RunnerError: torchrun itself did, for example since the other nodes never came.
        Cancelled: the node asked the task to stop.
    """
    folder = groups.reports_dir(ctx)
    folder.mkdir(parents=True, exist_ok=True)
    order = Order(task_type=plan.kind.task_type, job=ctx.job, fetched=fetched, layout=layout)
    (folder / ORDER_FILE).write_bytes(msgspec.json.encode(order))
    parent = os.getpid()
    with _listening(folder) as listener:
        agent = subprocess.Popen(
            command(plan, layout, folder, ctx.job.task_id),
            env={**os.environ, **_environment(plan)},
            preexec_fn=lambda: ranks.die_with_parent(parent),  # noqa: PLW1509 - this process has one thread
        )
        ended_by_us = True
        try:
            _serve(listener, agent, ctx)
            ended_by_us = False
        finally:
            _end(agent)
    status = agent.returncode
    if status != 0 and all(ranks.read_report(folder, local) is None for local in range(layout.ranks)):
        raise RunnerError(f"torchrun ended with {status} before a rank started; see the task's log")
    endings = [groups.Ending(local, status, ended_by_us) for local in range(layout.ranks)]
    return groups.verdict(ctx, folder, endings)


def command(plan: Plan, layout: Layout, folder: Path, task_id: str = "") -> list[str]:
    """torchrun's command line, the same on each node but for its rank.

    Args:
        task_id: shown in the command lines of the launcher and the ranks.
    """
    training = plan.training
    local = ["--local-addr", "127.0.0.1"] if _is_local(plan) else []
    # c10d numbers the nodes by itself; where they have numbers it must not
    numbered = training.node_rank is not None
    rank = ["--node-rank", str(training.node_rank)] if numbered else []
    backend = "static" if numbered else "c10d"
    return [
        *(sys.executable, "-m", LAUNCHER),
        *("--nnodes", str(layout.nodes), "--nproc-per-node", str(layout.ranks)),
        *("--rdzv-backend", backend, "--rdzv-endpoint", str(training.rdzv_endpoint), "--rdzv-id", training.rdzv_id),
        *("--max-restarts", "0", "--monitor-interval", "0.2", *local, *rank),
        *("-m", RANK_MODULE, str(folder), *filter(None, [task_id])),
    ]


def _is_local(plan: Plan) -> bool:
    return str(plan.training.rdzv_endpoint).rpartition(":")[0] in LOCAL_HOSTS


def _environment(plan: Plan) -> dict[str, str]:
    if _is_local(plan):
        return {"GLOO_SOCKET_IFNAME": "lo"}
    return interfaces(str(plan.training.rdzv_endpoint).rpartition(":")[0].strip("[]"))


def _serve(listener: socket.socket, agent: subprocess.Popen[bytes], ctx: Context) -> None:
    """Pass the task's pipe to the rank that connects, until torchrun exits."""
    handle = os.pidfd_open(agent.pid)
    try:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        poller.register(handle, select.POLLIN)
        while handle not in (ready := {fd for fd, _ in poller.poll()}):
            if listener.fileno() in ready:
                with listener.accept()[0] as peer:
                    pipe = ctx.pipe
                    socket.send_fds(peer, [b"p"], [] if pipe is None else [pipe.fileno()])
    finally:
        os.close(handle)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End torchrun, which forwards SIGTERM. Remaining ranks are killed with it (PDEATHSIG)."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if agent.poll() is None:
            agent.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(groups.GRACE_S)
        if agent.poll() is None:
            agent.kill()
        agent.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    """A unix socket in `folder`, whose path may be longer than such a socket's may be."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    (folder / SOCKET).unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"/proc/self/fd/{handle}/{SOCKET}")
            listener.listen(1)
            yield listener
    finally:
        os.close(handle)
