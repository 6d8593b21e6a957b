"""Where the node's secrets can be read by other processes of its user: nowhere, once the process that has them runs."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from flowmesh.processes.forkserver import Options
from flowmesh.startup import secret_environ
from tests.kit.http_server import Answer, Server
from tests.kit.support import ROOT, Node, Orchestrator, end_process, spares, until

PR_CAPBSET_DROP = 24
MAY_READ_ALL = (19, 21, 38)
"""CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON: each lets its owner read the environment of any process."""
SECRETS = {"REDIS_URL": "redis://u:pa55word@127.0.0.1:1/0", "ORCHESTRATOR_TOKEN": "n0de-token"}
TAKES = """
import os, sys
from flowmesh.startup import secret_environ
environ = secret_environ.take(os.environ)
print(sorted(name for name in secret_environ.SECRETS if name in os.environ), environ["ORCHESTRATOR_TOKEN"], flush=True)
sys.stdin.read()
"""
PROBE = "import sys; sys.stdout.buffer.write(open(f'/proc/{sys.argv[1]}/environ', 'rb').read())"


def like_a_task() -> None:
    """Give up root's right to read any process. Other users have none to give up."""
    for capability in MAY_READ_ALL:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@contextmanager
def started(*command: str, env: dict[str, str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=like_a_task,  # noqa: PLW1509 - the test has one thread
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        end_process(process, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def environment_of(pid: int) -> bytes | None:
    """What a process of the same user reads of another one's environment; None: it may not."""
    command = [sys.executable, "-c", PROBE, str(pid)]
    done = subprocess.run(command, capture_output=True, preexec_fn=like_a_task, check=False)
    assert done.returncode == 0 or b"PermissionError" in done.stderr, done.stderr
    return done.stdout if done.returncode == 0 else None


def test_a_process_that_took_the_secrets_cannot_be_read() -> None:
    with started("-c", TAKES, env=SECRETS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"[] n0de-token\n"
        assert environment_of(process.pid) is None
    with started("-c", "print(flush=True); input()", env=SECRETS) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert b"n0de-token" in (environment_of(process.pid) or b""), "the probe reads what is not hidden"


def test_secrets_are_handed_over_an_exec_without_the_environment() -> None:
    with secret_environ.handed_over({"PLAIN": "1", **SECRETS}) as (env, descriptor):
        assert env == {"PLAIN": "1", secret_environ.VARIABLE: str(descriptor)}
        with pytest.raises(OSError, match="No such device or address"):
            open(f"/proc/self/fd/{descriptor}", "rb")  # noqa: SIM115 - a socket cannot be opened a second time
        with started("-c", TAKES, env=env, pass_fds=(descriptor,)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"[] n0de-token\n"


@pytest.mark.parametrize("descriptor", ["999", "x", "", "0"])
def test_a_descriptor_that_holds_no_secrets_is_ignored(descriptor: str) -> None:
    environ = {secret_environ.VARIABLE: descriptor, "REDIS_URL": "redis://h"}
    program = f"from flowmesh.startup import secret_environ as s; print(s.take({environ!r}))"
    with started("-c", program, env={}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"{'REDIS_URL': 'redis://h'}\n"


@pytest.mark.parametrize("hidden", [True, False])
def test_children_that_get_a_secret_are_hidden_before_it(tmp_path: Path, hidden: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        listener.set_inheritable(True)
        options = Options(socket=str(tmp_path / "s"), fd=listener.fileno(), hidden=hidden)
        command = ("-P", "-m", "flowmesh.processes.forkserver", msgspec.json.encode(options).decode())
        with (
            started(*command, env={"MARK": "1"}, pass_fds=(listener.fileno(),)) as server,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as supervisor,
        ):
            supervisor.connect(str(tmp_path / "s"))
            ahead = until(lambda: spares(server.pid), "the server has a spare child")
            for pid in (server.pid, *ahead):
                assert (environment_of(pid) is None) == hidden


@pytest.mark.redis
def test_after_a_reload_the_environment_holds_no_secret(orchestrator: Orchestrator, make_node) -> None:
    node: Node = make_node(env={"ORCHESTRATOR_TOKEN": "n0de-token"})
    for count in (2, 3):  # what was handed over once is handed over again
        os.kill(node.pid, signal.SIGHUP)
        until(lambda count=count: node.text().count("node started") == count, "it has started anew", 60)
        assert b"n0de-token" not in Path(f"/proc/{node.pid}/environ").read_bytes()
    with Server() as server:
        node.args += ["--set", f"delivery.orchestrator_url={server.url}"]
        server.plan = [Answer(201, b"{}")] * 4
        node.stop()
        node.start()
        os.kill(node.pid, signal.SIGHUP)
        until(lambda: "status=IDLE" in "".join(node.text().split("node started")[5:]), "it takes tasks anew", 60)
        destination = {"type": "http", "url": f"{server.url}/api/v1/results"}
        orchestrator.run("w1", {"taskType": "echo", "output": {"destination": destination}})
        assert {request.headers.get("authorization") for request in server.received} == {"Bearer n0de-token"}
