"""What `flowmesh top` costs the supervisor: it polls the status once a second, here with 100 waiting tasks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time

from tests.bench.measure import Row, cpu_s, deployment, pss_bytes
from tests.kit.paths import ROOT
from tests.kit.support import until

WAITING = 100


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    seconds = 10 if quick else 30
    config = '[task_types.sleep]\nrunner = "tests.kit.runners_for_tests:MisbehavingRunner"\nenvironment = "light"\n'
    with deployment("--log-level", "WARNING", env={"HEARTBEAT_INTERVAL_SEC": "30"}, config=config) as (node, peer):
        for number in range(WAITING + 1):
            peer.dispatch("w1", {"taskType": "sleep", "do": "sleep", "seconds": 600}, task_id=f"waits-{number}")
        until(lambda: node.ask(op="status")["queued"] == WAITING, "tasks wait")
        time.sleep(2)
        alone, pss_alone = _share(node.pid, seconds), pss_bytes(node.pid)
        near, far = pty.openpty()
        command = [sys.executable, "-m", "flowmesh.cli.main", "top", "--state-dir", str(node.state_dir)]
        env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        top = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, env=env, start_new_session=True)
        threading.Thread(target=_drain, args=(near,), daemon=True).start()
        try:
            time.sleep(3)
            watched, pss = _share(node.pid, seconds), pss_bytes(node.pid)
            viewer = _share(top.pid, seconds)
        finally:
            top.terminate()
            top.wait()
            os.close(far)
    return [
        Row(
            f"supervisor with `flowmesh top` open and {WAITING} tasks waiting, share of a core",
            f"{watched * 100:.2f} %",
            f"{alone * 100:.2f} % without it",
            "under 1 %",
            number=watched,
        ),
        Row("the same, PSS", f"{pss / 1e6:.1f} MB", f"{pss_alone / 1e6:.1f} MB without it", "under 40 MB", number=pss),
        Row("`flowmesh top` itself, share of a core", f"{viewer * 100:.2f} %", number=viewer),
    ]


def _share(pid: int, seconds: float) -> float:
    before = cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - before) / seconds


def _drain(fd: int) -> None:
    while True:
        try:
            if not os.read(fd, 65536):
                return
        except OSError:
            return
