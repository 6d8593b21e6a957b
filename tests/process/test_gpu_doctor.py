"""`flowmesh doctor` on machines with and without GPUs, and with and without a node's requirements."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.kit.gpu_node import (
    GIB,
    TWO_GPUS,
    A,
    B,
    MakeGpuNode,
    held,
)
from tests.kit.nvml_stub.harness import Stub, library
from tests.kit.support import ROOT, Orchestrator, RedisServer, until

pytestmark = pytest.mark.redis


def environ(folder: Path, redis: str | None, script: str | None = None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "REDIS_URL")}
    env |= {"RESULTS_DIR": str(folder / "results"), "STATE_DIRECTORY": str(folder / "state"), "PYTHONPATH": str(ROOT)}
    if redis is not None:
        env["REDIS_URL"] = redis
    if script is not None:
        Stub(folder / "script", script)
        env |= {"LD_LIBRARY_PATH": str(library().parent), "FLOWMESH_NVML_STUB": str(folder / "script")}
    return env


def doctor(env: dict[str, str], *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Its exit status, which depends on the findings' levels, and its findings."""
    command = [sys.executable, "-m", "flowmesh.cli.main", "doctor", "--json", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    assert report["ok"] == (not [each for each in report["findings"] if each["level"] == "broken"])
    return done.returncode, report["findings"]


def of(findings: list[dict[str, str]], area: str) -> list[tuple[str, str]]:
    return [(each["level"], each["text"]) for each in findings if each["area"] == area]


def test_a_machine_where_nothing_is_broken(redis_server: RedisServer, tmp_path: Path) -> None:
    code, findings = doctor(environ(tmp_path, redis_server.url, TWO_GPUS))
    assert code == 0
    assert of(findings, "GPUs") == [
        ("ok", "driver 580.65, CUDA up to 13.0"),
        ("ok", f"GPU 0 NVIDIA H100 ({A}): 0.5G of 80G in use, 0 °C"),
        ("ok", f"GPU 1 NVIDIA H100 ({B}): 0.5G of 80G in use, 0 °C"),
    ]
    (level, text), *_limits = of(findings, "Redis")
    assert level == "ok"
    assert text.startswith(f"{redis_server.url} answers (")
    assert of(findings, "node") == [("note", "not running")]
    assert ("ok", f"light ({sys.executable}): api, echo") in of(findings, "environments")
    if find_spec("torch") is not None and "+cpu" in version("torch"):
        said = f"default: torch {version('torch')} is built without CUDA: its tasks run on the CPU"
        assert ("warn", said) in of(findings, "environments")
    ((_, slot),) = of(findings, "slots")
    assert slot.startswith("main: GPUs 0-1, CPUs ")
    assert {"isolation", "limits", "disk", "tools"} <= {each["area"] for each in findings}
    assert not (tmp_path / "state").exists(), "it changes nothing"


def test_a_machine_without_gpus_is_fine(redis_server: RedisServer, tmp_path: Path) -> None:
    env = environ(tmp_path, redis_server.url, "init 9\n")  # the library is installed, the kernel module is not loaded
    env["CUDA_VISIBLE_DEVICES"] = "0"  # as some images set it
    code, findings = doctor(env)
    assert code == 0
    assert of(findings, "GPUs") == [("ok", "none: CPU-only node")]
    ((level, slot),) = of(findings, "slots")
    assert (level, slot.split(",")[0]) == ("ok", "main: no GPU")


def test_one_gpu_that_is_down_leaves_the_slots_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[[slots]]\nname = 'a'\ngpus = [0]\n[[slots]]\nname = 'b'\ngpus = [1]\n")
    script = f"{TWO_GPUS}\nset {A} mig 1\n"
    code, findings = doctor(environ(tmp_path, None, script) | {"CUDA_VISIBLE_DEVICES": "0,1"}, "--config", str(file))
    assert code == 1
    (mig,) = [each for each in findings if each["text"].startswith("GPU 0: MIG mode is on")]
    assert mig["remedy"].startswith("sudo nvidia-smi mig -i 0 -cgi ")
    (missing, good) = of(findings, "slots")
    assert (good[0], good[1].split(",")[0]) == ("ok", "b: GPU 1")
    assert missing == ("broken", "a: GPU 0 is not there; its worker is DEGRADED until it is")


def test_what_is_broken_ends_it_with_1_and_names_the_mending(tmp_path: Path) -> None:
    script = f"{TWO_GPUS}\nfail memory {A} 15\nfail memory_v1 {A} 15\nset {B} throttle 0x40\nprocess {B} 1 {GIB}\n"
    env = environ(tmp_path, f"unix://{tmp_path}/no.sock", script) | {"WORKER_COST_PER_HOUR": "-1"}
    code, findings = doctor(env)
    assert code == 1
    broken = {each["area"]: each for each in findings if each["level"] == "broken"}
    assert broken["settings"]["text"].startswith("WORKER_COST_PER_HOUR: node.cost_per_hour: expected")
    assert broken["GPUs"]["text"] == "GPU 0: GPU is lost"
    assert broken["GPUs"]["remedy"] == "sudo nvidia-smi --gpu-reset -i 0; or reboot"
    warned = [each["text"] for each in findings if each["level"] == "warn" and each["area"] == "GPUs"]
    assert warned[0] == "GPU 1 is throttled: hw_thermal"
    assert warned[1].startswith("GPU 1 is used by pid 1 (")


def test_a_redis_that_does_not_answer_is_broken_and_none_is_not(tmp_path: Path) -> None:
    code, findings = doctor(environ(tmp_path, f"unix://{tmp_path}/no.sock"))
    ((level, text),) = of(findings, "Redis")
    assert (code, level) == (1, "broken")
    assert "does not answer" in text
    code, findings = doctor(environ(tmp_path, None))
    assert (code, of(findings, "Redis")[0][0]) == (0, "warn")


def test_settings_from_a_file_decide_what_is_looked_at(redis_server: RedisServer, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        f"[results]\ndir = '{file}/out'\n[[slots]]\nname = 'a'\ngpus = [7]\n"
        f"[environments.old]\npython = '{tmp_path}/python'\n[task_types.mine]\nrunner = 'a:B'\nenvironment = 'old'\n"
    )
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    env = environ(tmp_path, redis_server.url, TWO_GPUS)
    del env["RESULTS_DIR"]
    code, findings = doctor(env, "--config", str(file))
    assert code == 1
    assert of(findings, "slots") == [
        ("broken", "slots[0].gpus[0]: '7' matches no GPU; this node has: 0 GPU-aaaa, 1 GPU-bbbb")
    ]
    assert ("broken", f"results.dir {file}/out: not writable for this user") in of(findings, "disk")
    assert any(level == "broken" and "mine" in text for level, text in of(findings, "environments"))


def test_a_running_node_tells_why_a_slot_is_closed(
    orchestrator: Orchestrator, gpu_node: MakeGpuNode, tmp_path: Path
) -> None:
    node = gpu_node()
    task_id, pid = held(orchestrator, node)
    node.stub.add(f"process {A} {pid} {GIB}")
    file = tmp_path / "node.toml"
    file.write_text(f"[node]\nstate_dir = '{node.state_dir}'\n")
    script = "\n".join(node.stub.lines)
    code, findings = doctor(environ(tmp_path, node.server.url, script), "--config", str(file))
    assert code == 0
    assert of(findings, "node") == [("ok", f"running: pid {node.pid}, 1 task, 1 worker")]
    assert not [text for _, text in of(findings, "GPUs") if "is used by" in text], (
        "the node's own tasks are not foreign processes"
    )
    node.stub.change(f"set {B} used", f"set {B} used {9 * GIB}")
    node.let_go(task_id)
    node.wait_word("DEGRADED")
    code, findings = doctor(environ(tmp_path, node.server.url, script), "--config", str(file))
    assert code == 1
    assert any(
        level == "broken" and text.startswith("w1 degraded for ") and ": GPU-" in text
        for level, text in of(findings, "node")
    )


def test_on_a_terminal_of_80_columns_no_line_is_longer(tmp_path: Path) -> None:
    script = f"{TWO_GPUS}\nprocess {B} 1 {GIB}\n"
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    env = environ(tmp_path, f"unix://{tmp_path}/no.sock", script) | {"TERM": "xterm"}
    env.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", "doctor"], env=env, stdout=far, stderr=far, stdin=far
    )
    os.close(far)
    out = b""
    try:
        while chunk := os.read(near, 4096):
            out += chunk
    except OSError:  # the last writer closed the terminal
        pass
    os.close(near)
    assert process.wait(30) == 1
    plain = out.decode().replace("\r", "")
    for code in range(110):
        plain = plain.replace(f"\x1b[{code}m", "")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    assert "  broken Redis at" in plain
    assert plain.splitlines()[-1].startswith("1 broken, ")


def test_a_torch_for_a_newer_driver_is_broken_and_said_at_the_start(
    redis_server: RedisServer, gpu_node: MakeGpuNode, tmp_path: Path
) -> None:
    """By an interpreter whose torch says to be built for CUDA 13, on drivers 535 and 580, and on a Pascal card."""
    pytest.importorskip("transformers", reason="without it no task type needs torch")
    package = tmp_path / "lib" / "torch"
    package.mkdir(parents=True)
    (package / "version.py").write_text("__version__ = '2.13.0'\ncuda = '13.0'\n")
    (package / "__init__.py").write_text("class _C:\n    _cuda_getArchFlags = staticmethod(lambda: 'sm_75 sm_90')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/lib:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = f'[environments.cuda]\npython = "{python}"\n[task_types.inference]\nenvironment = "cuda"\n'
    (tmp_path / "node.toml").write_text(f'{config}[redis]\nurl = "{redis_server.url}"\n')

    def broken(script: str) -> list[str]:
        env = environ(tmp_path, redis_server.url, script)
        _, findings = doctor(env, "--config", str(tmp_path / "node.toml"))
        return [text for level, text in of(findings, "environments") if level == "broken" and text.startswith("cuda: ")]

    old = TWO_GPUS.replace("driver 580.65", "driver 535.216").replace("cuda 13000", "cuda 12020")
    (only,) = broken(old)
    assert only.startswith("cuda: torch 2.13.0 is built for CUDA 13.0, and driver 535.216 supports CUDA up to 12.2")
    assert broken(TWO_GPUS) == []
    (only,) = broken(f"{TWO_GPUS}\n    set {A} capability 61")
    assert "no code for GPU 0 NVIDIA H100 (compute capability 6.1): it is built for sm_75 sm_90" in only
    node = gpu_node(script=old, config=config)
    until(lambda: "it would see no GPU; install driver 580 or newer" in node.text(), "the node logs it")
