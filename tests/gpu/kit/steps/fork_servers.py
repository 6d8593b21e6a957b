"""A fork server has nothing on the device, and each of its children can use CUDA."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

from flowmesh.processes.preload import belongs_to_cuda
from tests.gpu.kit.scene import Scene, percentiles

TIMES = 10


def run(scene: Scene) -> None:
    first_s = []
    for number in range(TIMES):
        found = scene.result(scene.dispatch("kernel"))
        first_s.append(found["first_kernel_s"])
        assert found["right"], f"child {number} computed wrong on {found['visible']}"
        assert scene.dry or found["devices"] == 1, f"child {number} sees {found['devices']} devices"
    scene.row("forked children use CUDA, in a row", ok=True, value=f"{TIMES} of {TIMES} computed right")
    scene.row("fork → first kernel done: p50 / p99", ok=None, value=percentiles(first_s))
    check_servers(scene, "torch")
    if importlib.util.find_spec("vllm") is None:
        scene.skip("fork server of vLLM", "vLLM is not installed here")
        return
    found = scene.result(scene.dispatch("kernel", task_type="kit_vllm"))
    scene.row("a forked child of vLLM's server uses CUDA", ok=found["right"], value=f"{found['first_kernel_s']:.2f} s")
    check_servers(scene, "vllm")


def check_servers(scene: Scene, environment: str) -> None:
    """A row: no fork server of this environment is among NVML's processes, or has a context's files open or mapped."""
    servers = scene.node.ask(op="status")["servers"]
    pids = [each["pid"] for each in servers if each["environment"] == environment]
    assert pids, f"no fork server of {environment} is there: {servers}"
    look = scene.sample()
    listed = {process.pid for process in (*(look.processes or ()), *look.graphics)}
    wrong: list[str] = []
    files = sorted({path for pid in pids for path in device_files(pid)})
    for pid in pids:
        if pid in listed:
            wrong.append(f"NVML lists fork server {pid}")
        open_ = [path for path in device_files(pid) if belongs_to_cuda(path)]
        wrong += [f"fork server {pid} has {path} open, as CUDA's contexts have" for path in open_]
        wrong += [f"fork server {pid} has mapped {path}" for path in mapped(pid) if path.startswith("/dev/nvidia")]
    scene.row(
        f"fork server of {environment}: no process and no context on the device",
        ok=not wrong,
        value=f"{len(pids)} servers; processes listed: {len(listed)}; open files of the driver: {files or 'none'}",
        why="; ".join(wrong),
    )


def device_files(pid: int) -> list[str]:
    """The device files of the driver that a process has open."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                path = str(Path(f"/proc/{pid}/fd", fd).readlink())
                if path.startswith("/dev/nvidia"):
                    found.add(path)
    return sorted(found)


def mapped(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return sorted({line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) > 5})
    return []
