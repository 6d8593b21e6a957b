"""Another system that has each job in a forked process of its own, and nothing of a node besides: RQ."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kit.support import RedisServer, end_process


@contextlib.contextmanager
def running() -> Iterator[Callable[[], None] | None]:
    """A worker, and what has it do one job and waits for the result; None where RQ is not installed."""
    try:
        import rq
    except ImportError:
        yield None
        return
    server = RedisServer()
    command = [str(Path(sys.executable).with_name("rq")), "worker", "--quiet", "--url", f"unix://{server.path}"]
    worker = subprocess.Popen(command, cwd=server.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    jobs = rq.Queue(connection=server.client())

    def one() -> None:
        result = jobs.enqueue("operator.neg", 1).latest_result(timeout=30)
        if result is None or result.return_value != -1:
            raise RuntimeError("RQ's worker does not answer")

    try:
        one()
        yield one
    finally:
        end_process(worker)
        server.close()
