"""The case that matters most: a real vLLM task whose engine runs in processes of its own, and whose first process dies.

vLLM's engine and worker processes survive a SIGKILL of their parent, with gigabytes and the GPU in their hands. Here
nothing of them may be left, and the next task runs.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import Node, Orchestrator, alive, below, until, with_mark

pytestmark = [
    pytest.mark.redis,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: scripts/test does it"),
]

CONFIG = """
[task_types.vllm_generate]
runner = "tests.vllm_runner:GenerateRunner"
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("isolation", ["auto", "subreaper"])
def test_p1_nothing_of_vllm_outlives_a_sigkill_in_mid_generation(
    orchestrator: Orchestrator, make_node, tmp_path: Path, isolation: str
) -> None:
    from tests.tiny_models import write_tiny_llama

    model = tmp_path / "model"
    model.mkdir()
    write_tiny_llama(model)
    node: Node = make_node("--set", f"processes.isolation={isolation}", config=CONFIG)
    shm = set(os.listdir("/dev/shm"))
    spec = {"taskType": "vllm_generate", "model": str(model)}
    task = orchestrator.dispatch("w1", spec)
    orchestrator.wait_started(task, 120)
    flag = node.results_dir / task / "generating"
    until(flag.exists, "it generates", 240)
    time.sleep(0.5)
    pid = node.task_pid(task)
    tree = below(pid)
    names = {each: Path(f"/proc/{each}/cmdline").read_bytes().decode(errors="replace") for each in tree}
    comms = {Path(f"/proc/{each}/comm").read_text().strip() for each in tree}
    assert any("EngineCore" in text for text in [*names.values(), *comms]), (names, comms)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not [each for each in (pid, *tree) if alive(each)], "all of it is gone", 5)
    end = orchestrator.wait_end(task)
    assert end["payload"]["error_kind"] == "crash"
    assert end["payload"]["exit"]["signal"] == "SIGKILL"
    assert end["payload"]["resources"]["processes_swept"] >= 2
    assert with_mark(f"FLOWMESH_ATTEMPT={node.ask(op='status')['node_id']}:") == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shm if name.startswith(("psm_", "vllm"))]
    assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    after = orchestrator.run("w1", {**spec, "tokens": 4}, 240)
    assert after["type"] == "TASK_SUCCEEDED", after
