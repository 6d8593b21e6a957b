"""Other systems that run jobs, each in turn with a node: an empty job, and a tiny batch of inference.

What is compared is not the same: the rows say what each gives a job of its own. Training and FAISS are compared with
the bare libraries in their own parts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.inference import SPEC
from tests.bench.measure import ECHO, Row, deployment, percentile, publish_to_end, spread, timed
from tests.bench.ratios import ratio
from tests.kit.paths import ROOT
from tests.kit.support import Orchestrator, RedisServer, end_process

Job = Callable[..., None]
"""Has the peer run one of `peer_jobs` by its name, with these arguments, and waits for its result."""
WAIT_S = 300.0


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    empty, inferences = (10, 2) if quick else (60, 10)
    rows = []
    with tempfile.TemporaryDirectory() as model, deployment("--log-level", "WARNING") as (_, peer):
        if can_infer := importlib.util.find_spec("transformers") is not None:
            from runners.models.builtin import write_tiny_llama

            write_tiny_llama(Path(model))
        for library, what, start in PEERS:
            if importlib.util.find_spec(library) is None:
                rows.append(Row(what, f"not measured: {library} is not installed"))
                continue
            with start() as job:
                rows.append(_row(f"{what}: an empty job", empty, peer, ECHO["spec"], lambda job=job: job("nothing")))  # type: ignore[misc]
                if can_infer:
                    infer = lambda job=job: job("infer", model)  # type: ignore[misc]  # noqa: E731
                    rows.append(_row(f"{what}: tiny inference", inferences, peer, SPEC, infer))
        again = lambda: publish_to_end(peer, ECHO["spec"])  # noqa: E731
        rows.append(_row("a node beside itself: an empty job", empty, peer, ECHO["spec"], again))
    return rows


def _row(what: str, pairs: int, peer: Orchestrator, spec: dict[str, object], theirs: Callable[[], object]) -> Row:
    """In turn; the first of each does not count."""
    ours_s, theirs_s = [], []
    for number in range(pairs + 1):
        values = publish_to_end(peer, spec), timed(theirs)
        if number:
            ours_s.append(values[0])
            theirs_s.append(values[1])
    found = ratio(ours_s, theirs_s)
    return Row(
        what,
        spread(theirs_s),
        f"a node takes {found} × that ({spread(ours_s)})",
        number=percentile(theirs_s, 0.5),
    )


@contextlib.contextmanager
def _rq() -> Iterator[Job]:
    import rq

    with _worker([_program("rq"), "worker", "--quiet", "--url", "unix://{path}"]) as server:
        jobs = rq.Queue(connection=server.client())

        def run(name: str, *arguments: object) -> None:
            queued = jobs.enqueue(f"tests.bench.peer_jobs.{name}", *arguments, job_timeout=int(WAIT_S))
            result = queued.latest_result(timeout=int(WAIT_S))
            if result is None or not result.return_value:
                raise RuntimeError("RQ's worker does not answer")

        yield run


def _celery(*options: str) -> Callable[[], contextlib.AbstractContextManager[Job]]:
    @contextlib.contextmanager
    def start() -> Iterator[Job]:
        from celery import Celery

        command = [_program("celery"), "-A", "tests.bench.peer_jobs", "--quiet", "worker", "-c", "1", "-l", "ERROR"]
        with _worker([*command, *options]) as server:
            broker = _broker(server)
            app = Celery("bench", broker=broker, backend=broker)

            def run(name: str, *arguments: object) -> None:
                if not app.send_task(name, arguments).get(timeout=WAIT_S, interval=0.001):
                    raise RuntimeError("Celery's worker does not answer")

            yield run
            app.close()

    return start


@contextlib.contextmanager
def _worker(command: list[str]) -> Iterator[RedisServer]:
    """A worker process with a Redis of its own."""
    server = RedisServer()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if command[0] == _program("celery"):  # whoever else imports the jobs must not import Celery for each of them
        env["BENCH_BROKER"] = _broker(server)
    full = [part.format(path=server.path) for part in command]
    worker = subprocess.Popen(full, cwd=server.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield server
    finally:
        end_process(worker)
        server.close()


def _broker(server: RedisServer) -> str:
    return f"redis+socket://{server.path}"


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


PEERS: tuple[tuple[str, str, Callable[[], contextlib.AbstractContextManager[Job]]], ...] = (
    ("rq", "RQ (a fork for each job; nothing of a job's processes is ended but the fork)", _rq),
    (
        "celery",
        "Celery, a new process for each task (`--max-tasks-per-child 1`)",
        _celery("--max-tasks-per-child", "1"),
    ),
    ("celery", "Celery as it is (tasks share a process: memory, threads and a crash reach the next one)", _celery()),
)
