"""A local model endpoint that a task starts, and that ends with the task."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flowmesh.redaction import Redactor
from flowmesh.web.session import TRUST_VARIABLES
from runners.agent.config import Serve
from runners.agent.secrets import from_env
from runners.agent.watch import Watch
from runners.api import Context, RunnerError

PASSED = (
    "PATH", "HOME", "USER", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "FLOWMESH_ATTEMPT", "PYTHONPATH", "VIRTUAL_ENV",
    *TRUST_VARIABLES,
)  # fmt: skip
LOG = "endpoint.log"
STOP_S = 5.0
POLL_S = 0.1


@contextlib.contextmanager
def endpoint(ctx: Context, wanted: Serve, agents: Path, watch: Watch, where: str, *, redact: Redactor) -> Iterator[str]:
    """Start the command, wait until it answers, and yield its base URL. It is stopped with the block.

    Raises:
        RunnerError: it exited, or did not answer in time; its log has the details.
        Cancelled, OutOfTime: from `watch`.
    """
    port = _free_port()
    values = {"{port}": str(port), "{python}": sys.executable, "{agents}": str(agents)}
    command = []
    for part in wanted.command:
        for name, value in values.items():
            part = part.replace(name, value)  # noqa: PLW2901 - each in turn
        command.append(part)
    env = {name: os.environ[name] for name in PASSED if name in os.environ}
    for name in wanted.env_from:
        env[name] = from_env(name, f"{where}.env_from")
        redact.learn(env[name])
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    log = ctx.out_dir / "logs" / LOG
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=ctx.tmp_dir,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RunnerError(f"{where}.command: {command[0]!r} cannot be started: {error.strerror}") from None
    try:
        base_url = f"http://127.0.0.1:{port}{wanted.path}"
        _wait(process, base_url, wanted, watch, who=f"{where}.command: {Path(command[0]).name}", log=log)
        ctx.log.info("local endpoint started url=%s", base_url)
        yield base_url
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], base_url: str, wanted: Serve, watch: Watch, *, who: str, log: Path) -> None:
    """Wait until it answers."""
    import requests

    session = requests.Session()
    session.trust_env = False  # no proxy for a server of this machine
    deadline = time.monotonic() + wanted.ready_timeout_s
    while True:
        watch.check()
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it wrote nothing"]
            raise RunnerError(f"{who} exited with status {process.returncode} before it answered: {last[0][:300]}")
        with contextlib.suppress(requests.RequestException):
            if watch.wait(lambda: session.get(f"{base_url}/models", timeout=2)).status_code < 500:
                return
        if time.monotonic() > deadline:
            raise RunnerError(f"{who} did not answer within {wanted.ready_timeout_s:g} s; see logs/{LOG}")
        watch.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of its process group


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
