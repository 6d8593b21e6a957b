"""Steps for the tests of the kit: what a real one may do wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tests.gpu.kit.budget import Share
from tests.gpu.kit.scene import Scene
from tests.gpu.kit.steps import Step

STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def quick(scene: Scene) -> None:
    scene.row("all is well", ok=True, value="1")


def fails(scene: Scene) -> None:
    scene.row("one row before", ok=True)
    raise RuntimeError("planted")


def wrong(scene: Scene) -> None:
    scene.row("a ratio", ok=False, value="0.5", aim="at least 0.9", evidence={"seen": "half | of it"})


def dies(scene: Scene) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(scene: Scene) -> None:
    """Leaves a daemon with an empty environment, writes its pid, and never returns."""
    pid_file = scene.out / "daemon"
    subprocess.run([sys.executable, "-c", STUBBORN, str(pid_file)], env={}, check=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    scene.row("it has begun", ok=True)
    time.sleep(600)


def _step(name: str, most_s: float = 30, *, does: str = "quick", least_s: float = 0.5, priority: int = 1) -> Step:
    share = Share(name=name, priority=priority, most_s=most_s, least_s=least_s)
    return Step(share, f"{__name__}:{does}")


STEPS = (
    _step("quick"),
    _step("fails", does="fails"),
    _step("wrong", does="wrong"),
    _step("dies", does="dies"),
    _step("hangs", 1.0, does="hangs"),
    _step("waits", 600, does="hangs"),
    _step("last"),
    _step("modest", 10, least_s=5, priority=2),
    _step("greedy", 24),
)
