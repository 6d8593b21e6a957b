"""Other systems that run jobs, each in turn with a node: an empty job, and a tiny batch of inference.

What is compared is not the same: the rows say what each gives a job of its own. Inference is measured where a system's
processes have imported the libraries before, as a node's fork servers have, and where each job imports them. Training
and FAISS are compared with the bare libraries in their own parts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.inference import SPEC
from tests.bench.measure import ECHO, Row, deployment, percentile, publish_to_end, spread, timed
from tests.bench.ratios import ratio
from tests.kit.paths import ROOT
from tests.kit.support import Orchestrator, RedisServer, end_process, short_dir, with_mark

Job = Callable[..., None]
"""Has the peer run one of `peer_jobs` by its name, with these arguments, and waits for its result."""
WAIT_S = 300.0
LONGEST_S = 12.0
"""After so long a row gets no more pairs, but it has LEAST in any case."""
LEAST = 2
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""A network of its own: Ray's processes listen on all addresses of a machine."""


@dataclass(frozen=True)
class Peer:
    library: str
    name: str
    what: str
    """What a job shares with others."""
    start: Callable[[], contextlib.AbstractContextManager[Job]]
    jobs: Sequence[str] = ("nothing", "infer")


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    pairs = {"nothing": 10 if quick else 60, "infer": 3 if quick else 10}
    rows = []
    with tempfile.TemporaryDirectory() as model, deployment("--log-level", "WARNING") as (_, node):
        kinds: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
            "nothing": ("an empty job", ECHO["spec"], ())
        }
        if importlib.util.find_spec("transformers") is not None:
            from runners.models.builtin import write_tiny_llama

            write_tiny_llama(Path(model))
            kinds["infer"] = ("tiny inference", SPEC, (model,))
        for peer in PEERS:
            if why := _why_not(peer.library):
                rows.append(Row(f"{peer.name} ({peer.what})", f"not measured: {why}"))
                continue
            with peer.start() as job:
                for kind in filter(kinds.__contains__, peer.jobs):
                    title, spec, arguments = kinds[kind]
                    theirs = functools.partial(job, kind, *arguments)
                    rows.append(_row(f"{peer.name} ({peer.what}): {title}", pairs[kind], node, spec, theirs))
        for kind, (title, spec, _) in kinds.items():
            again = functools.partial(publish_to_end, node, spec)
            rows.append(_row(f"a node beside itself: {title}", pairs[kind], node, spec, again))
    return rows


def _why_not(library: str) -> str:
    """Why a peer cannot be measured here; empty: it can."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    if library == "ray" and subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode:
        return "Ray listens on all addresses, and `unshare --net` makes no network of its own here"
    return ""


def _row(what: str, most: int, node: Orchestrator, spec: dict[str, object], theirs: Callable[[], object]) -> Row:
    """In turn; the first of each does not count."""
    print(f"measuring: {what} …", file=sys.stderr, flush=True)
    publish_to_end(node, spec)
    theirs()
    ours_s, theirs_s = list[float](), list[float]()
    end = time.monotonic() + LONGEST_S
    while len(ours_s) < LEAST or (len(ours_s) < most and time.monotonic() < end):
        ours_s.append(publish_to_end(node, spec))
        theirs_s.append(timed(theirs))
    found = ratio(ours_s, theirs_s)
    return Row(
        what,
        spread(theirs_s),
        f"a node takes {found} × that ({spread(ours_s)}), {found.pairs} pairs",
        number=percentile(theirs_s, 0.5),
    )


def _rq(*, preloaded: bool) -> Callable[[], contextlib.AbstractContextManager[Job]]:
    @contextlib.contextmanager
    def start() -> Iterator[Job]:
        import redis
        import rq

        command = [_program("rq"), "worker", "--quiet", "--url", "unix://{path}"]
        if preloaded:
            command = [sys.executable, "-m", "tests.bench.peer_jobs", "{path}"]
        with _worker(command) as server:
            # without a limit of redis-py's own: a job that imports takes long
            jobs = rq.Queue(connection=redis.Redis(unix_socket_path=str(server.path), socket_timeout=None))

            def run(name: str, *arguments: object) -> None:
                queued = jobs.enqueue(f"tests.bench.peer_jobs.{name}", *arguments, job_timeout=int(WAIT_S))
                result = queued.latest_result(timeout=int(WAIT_S))
                if result is None or not result.return_value:
                    raise RuntimeError("RQ's worker does not answer")

            yield run

    return start


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


def _ray(*options: str) -> Callable[[], contextlib.AbstractContextManager[Job]]:
    @contextlib.contextmanager
    def start() -> Iterator[Job]:
        folder = short_dir()
        command = [*ALONE, sys.executable, "-m", "tests.bench.ray_jobs", str(folder), *options]
        env = {**os.environ, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
               "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def expect(wanted: str) -> None:
            if (line := answers.readline().strip()) != wanted:
                raise RuntimeError(f"Ray answered {line!r} instead of {wanted!r}")

        def run(name: str, *arguments: object) -> None:
            print(name, *arguments, file=asked)
            expect("ok")

        try:
            expect("ready")
            yield run
            process.communicate(timeout=WAIT_S)
        finally:
            end_process(process)
            for pid in with_mark(str(folder)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)

    return start


@contextlib.contextmanager
def _worker(command: list[str]) -> Iterator[RedisServer]:
    """A worker process with a Redis of its own."""
    server = RedisServer()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if command[0] == _program("celery"):  # whoever else imports the jobs must not import Celery for each of them
        env |= {"BENCH_BROKER": _broker(server), "BENCH_PRELOAD": "1"}
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


PEERS = (
    Peer("rq", "RQ", "a fork for each job; nothing of a job's processes is ended but the fork", _rq(preloaded=False)),
    Peer("rq", "RQ, libraries imported before the fork", "else as above", _rq(preloaded=True), ("infer",)),
    Peer(
        "celery",
        "Celery, `--max-tasks-per-child 1`, libraries imported before",
        "a new process for each task",
        _celery("--max-tasks-per-child", "1"),
    ),
    Peer(
        "celery",
        "Celery, libraries imported before",
        "tasks share a process: memory, threads and a crash reach the next one",
        _celery(),
    ),
    Peer("ray", "Ray, `max_calls=1`", "a new process for each task, which imports for itself", _ray("fresh")),
    Peer("ray", "Ray", "tasks share processes, and what these have imported", _ray()),
)
