"""The floors of the speed steps: bare Transformers and bare TRL with the same arguments, in a fresh interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys

from tests.gpu.kit import speed
from tests.gpu.kit.scene import NO_GPU, Scene, Skip

UNITS = {"generate": "tokens/s", "sft": "steps/s", "lora_sft": "steps/s"}


def run(scene: Scene) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed here")
    measures = ["model", "generate"]
    if why := speed.why_no_training():
        scene.skip("bare TRL", why)
    else:
        measures += ["sft", "lora_sft"]
    plan, out = scene.scratch / "plan.json", scene.scratch / "floors.json"
    plan.write_text(json.dumps({**speed.plan(scene), "measures": measures}))
    command = [sys.executable, "-m", "tests.gpu.kit.bare", str(plan), str(out)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": scene.gpu.uuid, "TOKENIZERS_PARALLELISM": "false"}
    why = ""
    # Meanwhile the node's fork server imports the same libraries, for a task of the slot without a GPU.
    warm = scene.dispatch("nothing", worker=NO_GPU, task_type="kit_models")
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, timeout=scene.left_s - 1, check=False)
        why = f"the bare script ended with {done.returncode}: see kit.log" if done.returncode else ""
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in measures:
        result = found.get(name, {})
        if "error" in result or (name not in found and why):
            scene.row(f"bare {name}", ok=False, why=why or "it raised", evidence={"error": result.get("error", "")})
        elif name not in found:
            scene.skip(f"bare {name}", "the step's time was over")
        elif name == "model":
            scene.row("a random model is written", ok=True, value=f"{result['parameters'] / 1e9:.2f} B parameters")
        else:
            value = f"{result['per_s']:.1f} {UNITS[name]} in {result['seconds']:.1f} s"
            scene.row(f"bare {name}", ok=None, value=value)
    if scene.left_s > 1:
        scene.result(warm)
