"""The working tree beside another commit: both run at once, and are measured in turn, the other commit twice.

What the other commit gives beside itself is the noise. What takes more is measured once more with other nodes: two
nodes of the same code differ by some percent for as long as they run. Both trees run with this environment's libraries.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmesh.client import Client
from tests.bench.inference import SPEC as INFERENCE
from tests.bench.measure import ECHO, Row, ms, pss_bytes, publish_to_end, timed
from tests.bench.ratios import over_both, ratio, regresses
from tests.bench.samples import processes_cpu_s
from tests.kit.paths import ROOT
from tests.kit.support import DEADLINE_S, Node, Orchestrator, RedisServer

AT_ONCE = 20
FOREIGN = 50


@dataclass(frozen=True)
class Instance:
    """A node of one of the trees."""

    code: Path
    node: Node
    peer: Orchestrator
    client: Client


@dataclass(frozen=True)
class Probe:
    what: str
    measured: Callable[[Instance], float]
    """One value; less is better."""
    shown: Callable[[float], str] = ms
    pairs: int = 20
    """With `--quick` half as many, but at least 10 where there are."""


def compare(revision: str, *, only: Sequence[str], quick: bool) -> tuple[list[Row], bool]:
    """
    Args:
        only: names of PROBES; empty: all.

    Returns:
        the table, and whether something takes more than the noise explains.
    """
    with _tree(revision) as old:
        with _instances(old) as instances:
            found = {name: _compared(name, instances, quick=quick) for name in only or PROBES}
        rows, worse = [each.row() for each in found.values()], False
        if suspects := [name for name, each in found.items() if each.worse]:
            with _instances(old) as instances:
                again = [_compared(name, instances, quick=quick) for name in suspects]
            rows += [each.row("again, with other nodes: ") for each in again]
            worse = any(each.worse for each in again)
        if _libraries(ROOT) != _libraries(old):
            rows.append(Row(f"{revision} asks for other libraries", "measured with those of this tree"))
    return rows, worse


@dataclass(frozen=True)
class Compared:
    """Values in turn."""

    probe: Probe
    news: list[float]
    olds: list[float]
    agains: list[float]
    """Of the other commit's second node."""

    @property
    def worse(self) -> bool:
        return regresses(self.news, self.olds, self.agains)

    def row(self, before: str = "") -> Row:
        new, old = (self.probe.shown(statistics.median(each)) for each in (self.news, self.olds))
        change, noise = over_both(self.news, self.olds, self.agains), ratio(self.agains, self.olds)
        return Row(
            before + self.probe.what,
            f"{new}, before {old}",
            f"{change} × before, of two nodes; these beside each other {noise}",
            "TAKES MORE" if self.worse else "within the noise, or less",
        )


def _compared(name: str, instances: Sequence[Instance], *, quick: bool) -> Compared:
    print(f"comparing: {name} …", file=sys.stderr, flush=True)
    probe = PROBES[name]
    pairs = min(probe.pairs, max(10, probe.pairs // 2)) if quick else probe.pairs
    return Compared(probe, *in_turn([_of(probe, each) for each in instances], pairs))


@contextlib.contextmanager
def _instances(old: Path) -> Iterator[list[Instance]]:
    """A node of this tree, and two of the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_instance(code)) for code in (ROOT, old, old)]


def in_turn(measured: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Values of each, after one round that does not count; who is first changes."""
    found: list[list[float]] = [[] for _ in measured]
    for number in range(rounds + 1):
        for step in range(len(measured)):
            at = (number + step) % len(measured)
            value = measured[at]()
            if number:
                found[at].append(value)
    return found


def _of(probe: Probe, instance: Instance) -> Callable[[], float]:
    return lambda: probe.measured(instance)


@contextlib.contextmanager
def _tree(revision: str) -> Iterator[Path]:
    """A commit's files, in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="fm-bench-") as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextlib.contextmanager
def _instance(code: Path) -> Iterator[Instance]:
    server = RedisServer()
    options = ["--log-level", "WARNING"]
    if "warm_max_mb" in (code / "flowmesh" / "settings" / "schema.py").read_text():
        options += ["--set", "processes.warm_max_mb=0"]  # imports in quiet moments would disturb the others
    node, peer = Node(server, *options, code=code, env={"HEARTBEAT_INTERVAL_SEC": "30"}), Orchestrator(server)
    try:
        node.start()
        with Client(server.url) as client:
            yield Instance(code, node, peer, client)
    finally:
        node.close()
        peer.close()
        server.close()


def _libraries(tree: Path) -> object:
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    return project["dependencies"], {**project["optional-dependencies"], "bench": ()}


def _echo(instance: Instance) -> float:
    return publish_to_end(instance.peer, ECHO["spec"])


def _echo_cpu(instance: Instance) -> float:
    before = processes_cpu_s(instance.node)
    for _ in range(AT_ONCE):
        _echo(instance)
    return (processes_cpu_s(instance.node) - before) / AT_ONCE


def _at_once(instance: Instance) -> float:
    peer = instance.peer

    def all_of_them() -> None:
        ids = {peer.dispatch("w1", ECHO["spec"]) for _ in range(AT_ONCE)}
        while ids:
            peer.hear(1.0)
            ids -= {event["task_id"] for event in peer.task_events if event["type"] == "TASK_SUCCEEDED"}
            peer.task_events.clear()

    return timed(all_of_them) / AT_ONCE


def _queued(instance: Instance) -> float:
    return timed(lambda: instance.peer.wait_end(instance.client.queue(ECHO).task_id))


def _foreign(instance: Instance) -> float:
    """CPU time of the supervisor for a 5 KB message to another worker. One after another: several that come at once
    cost less each, and how many come at once is the other programs' doing.
    """
    message = b'{"task_id": "x", "assigned_worker": "nobody", "task": {"spec": {"text": "%s"}}}' % (b"y" * 5000)
    pid, used_s = instance.node.pid, 0.0
    for _ in range(FOREIGN):
        slept, before = _slept(pid), _thread_s(pid)
        instance.peer.redis.publish("tasks", message)
        end = time.monotonic() + DEADLINE_S
        while _slept(pid) == slept and time.monotonic() < end:
            time.sleep(0)
        used_s += _thread_s(pid) - before
    return used_s / FOREIGN


def _slept(pid: int) -> int:
    """How often a process' first thread has gone to sleep."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def _thread_s(pid: int) -> float:
    """CPU time of a process' first thread, by the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _memory(instance: Instance) -> float:
    return float(pss_bytes(instance.node.pid))


def _start(instance: Instance) -> float:
    """CPU time of the command line's start, in that tree."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "flowmesh.cli.supervisor", "--help"]
    env = {**os.environ, "PYTHONPATH": str(instance.code)}
    subprocess.run(command, check=True, cwd=instance.code, env=env, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime


def _inference(instance: Instance) -> float:
    return publish_to_end(instance.peer, INFERENCE)


PROBES: Mapping[str, Probe] = {
    "echo": Probe("echo: publish → TASK_SUCCEEDED", _echo, pairs=40),
    "cpu": Probe(f"CPU time of an echo, all processes of the node, {AT_ONCE} one after another", _echo_cpu, pairs=12),
    "once": Probe(f"echo, per task, {AT_ONCE} at once", _at_once, pairs=12),
    "queue": Probe("echo: queue → TASK_SUCCEEDED", _queued, pairs=40),
    "foreign": Probe(
        "CPU time of a 5 KB message for another worker", _foreign, lambda s: f"{s * 1e6:.1f} µs", pairs=80
    ),
    "pss": Probe("supervisor after that, PSS", _memory, lambda size: f"{size / 1e6:.1f} MB", pairs=6),
    "start": Probe("CPU time of `flowmesh-supervisor --help`", _start, pairs=12),
    "inference": Probe("tiny Transformers task, forked", _inference, pairs=12),
}
