"""A process that is not the node's is on the GPU: the node names it, starts nothing, and opens again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.gpu.kit import runners
from tests.gpu.kit.scene import Scene
from tests.kit.support import until

BYTES = 2 << 30
HOLD = """
import json, os, sys
count, gpu, stub = json.loads(sys.argv[1])
if stub:
    with open(stub, "a") as script:
        script.write(f"holder {gpu} {os.getpid()} {count}\\n")
else:
    import torch
    held = torch.empty(count, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
print("holding", flush=True)
sys.stdin.read()
"""


def run(scene: Scene) -> None:
    _ = scene.node  # started first
    stub = os.environ[runners.STUB] if scene.dry else ""
    command = [sys.executable, "-c", HOLD, json.dumps([BYTES, scene.gpu.uuid, stub])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": scene.gpu.uuid}
    with subprocess.Popen(command, env=env, **pipes) as foreign:
        try:
            assert foreign.stdout is not None
            assert foreign.stdout.readline(), "the foreign process could not use the GPU"
            scene.wait_word("DEGRADED")
            reason = until(scene.reason, "the slot has a reason", 5)
            named = f"pid {foreign.pid} " in reason and "used by a foreign process" in reason
            scene.row("a foreign process is named, and its slot is closed", ok=named, value=reason[:200], why=reason)
        finally:
            foreign.kill()
    scene.wait_word("IDLE")
    found = scene.result(scene.dispatch("kernel"))
    scene.row("the slot is open when the process has gone", ok=found["right"])
