"""What fork servers import leaves them safe to fork: one thread, no GPU; and an agent's without torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from flowmesh.processes.environ import SERVER
from tests.kit.paths import ROOT

PRELOADS = {
    "runners.agent.preload:AGENT": ("smolagents",),
    "runners.inference.preload:TRANSFORMERS": ("transformers", "peft"),
    "runners.rag.preload:RAG": ("faiss", "sentence_transformers"),
}
"""Each with what it needs, in the order of their imports: torch comes with the second."""
IMPORTS = """
import importlib, json, os, sys
for reference in sys.argv[1:]:
    module, name = reference.split(":")
    for each in getattr(importlib.import_module(module), name):
        importlib.import_module(each)
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_initialized()
    print(json.dumps([reference, len(os.listdir("/proc/self/task")), gpu, torch is not None]))
"""


def test_a_fork_server_with_a_preload_keeps_one_thread_and_no_gpu() -> None:
    """In one process, as their imports cost seconds: threads and contexts stay once they are there."""
    there = [name for name, needs in PRELOADS.items() if all(map(importlib.util.find_spec, needs))]
    if not there:
        pytest.skip("needs an extra with a preload")
    env = {**os.environ, **SERVER, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORTS, *there], env=env, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert said == [[name, 1, False, "agent" not in name] for name in there]
