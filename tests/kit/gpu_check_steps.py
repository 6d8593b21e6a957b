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


def _step(name: str, most_s: float = 30) -> Step:
    return Step(Share(name=name, priority=1, most_s=most_s, least_s=0.5), f"{__name__}:{name}")


STEPS = (_step("quick"), _step("fails"), _step("wrong"), _step("dies"), _step("hangs", 1.0))
FOREVER = Step(Share(name="waits", priority=1, most_s=600, least_s=1), f"{__name__}:hangs")
STEPS = (*STEPS, FOREVER, Step(Share(name="last", priority=1, most_s=30, least_s=0.5), f"{__name__}:quick"))
