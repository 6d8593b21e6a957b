"""`scripts/gpu-check` as it runs on a real machine, with a stub of NVIDIA's library and torch on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kit.dry import MORE as MORE_LINES
from tests.gpu.kit.steps import MORE as MORE_STEPS
from tests.gpu.kit.steps import STEPS
from tests.kit.paths import ROOT
from tests.kit.support import alive, below, short_dir, until, with_mark
from tests.kit.wheels import write_wheel

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler for the stub of NVML")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report"


@pytest.fixture
def start(out: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the kit; nothing of it may be left at the end of the test."""
    running: list[subprocess.Popen[str]] = []
    temporary = short_dir()

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [str(ROOT / "scripts" / "gpu-check"), "--dry", "--out", str(out), "--wheels", str(tmp_path / "none")]
        env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(temporary), **environment}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([*command, *arguments], env=env, **pipes))
        return running[-1]

    yield start
    for kit in running:
        with contextlib.suppress(ProcessLookupError):
            kit.kill()
        kit.communicate()
    until(lambda: not with_mark(str(temporary)), "no process of the kit is left", 20)
    temporary.rmdir()  # which fails where a file is left


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def by_step(out: Path, status: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in report(out)["rows"]:
        if row["status"] == status:
            found.setdefault(row["step"], []).append(row["what"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_spec("trl") is None, reason="needs the extra training")
def test_all_steps_run_and_change_nothing(start: Start, out: Path) -> None:
    kit = start("--xid")
    shown, _ = kit.communicate(timeout=380)
    assert kit.returncode == 0, f"{shown}\n{(out / 'report.md').read_text()}"
    found = report(out)
    assert (found["state"], found["dry"]) == ("finished", True)
    assert by_step(out, "FAILED") == {}
    done = by_step(out, "ok")
    every = {step.share.name for step in STEPS}
    assert every - set(done) == {"heartbeats", "gap", "training"}, (
        "their rows are times, which a dry run does not judge"
    )
    assert {"heartbeats", "gap", "training", "inference", "floors"} <= set(by_step(out, "noted"))
    assert "nobody changed a setting of the device" in done["suite"]
    assert len(done["faults"]) == 7
    assert all(row["why"] for row in found["rows"] if row["status"] == "skipped")
    assert "vLLM is not installed here" in (out / "report.md").read_text()
    assert found["machine"]["gpu"].startswith("NVIDIA H100 80GB HBM3 (80 GiB)")
    files = list(out.rglob("*"))
    assert len(files) <= 8, files


def test_a_step_that_hangs_fails_or_dies_is_a_row_and_the_next_one_runs(start: Start, out: Path) -> None:
    kit = start("--only", "quick,fails,wrong,dies,hangs,last", **{MORE_STEPS: "tests.kit.gpu_check_steps"})
    shown, _ = kit.communicate(timeout=60)
    assert kit.returncode == 1, shown
    assert report(out)["state"] == "finished"
    failed = {row["step"]: row for row in report(out)["rows"] if row["status"] == "FAILED"}
    assert set(failed) == {"fails", "wrong", "dies", "hangs"}
    assert failed["fails"]["why"] == "RuntimeError: planted"
    assert "in fails" in failed["fails"]["evidence"]["where"]
    assert failed["wrong"]["why"] == "measured 0.5, aim: at least 0.9"
    assert "used_bytes" in failed["wrong"]["evidence"]["NVML"]
    assert failed["dies"]["why"] == "the process that ran it ended with SIGKILL"
    assert failed["hangs"]["why"] == "it did not end within 1 s: killed with all its processes"
    assert "in hangs" in failed["hangs"]["evidence"]["where it hung"]
    assert not alive(int((out / "daemon").read_text()))
    assert by_step(out, "ok") == {
        "quick": ["all is well"],
        "fails": ["one row before"],
        "hangs": ["it has begun"],
        "last": ["all is well"],
    }
    lines = (out / "report.md").read_text().splitlines()
    table = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")][2:]
    assert table == ["FAILED"] * 4 + ["ok"] * 4
    assert "half | of it" in lines
    assert len((out / "rows.jsonl").read_text().splitlines()) == len(report(out)["rows"])


@pytest.mark.parametrize("end", ["SIGTERM to the kit", "SIGKILL to the kit", "SIGKILL to its session"])
def test_a_kit_that_is_ended_leaves_a_whole_report_and_no_process(start: Start, out: Path, end: str) -> None:
    kit = start("--only", "quick,waits,last", **{MORE_STEPS: "tests.kit.gpu_check_steps"})
    until((out / "daemon").exists, "the step has begun")
    daemon = int(until((out / "daemon").read_text, "its pid is written"))
    until(lambda: "waits" in by_step(out, "ok"), "each row is on disk as soon as it is known")
    assert report(out)["state"] == "running"
    assert "(in step waits)" in (out / "report.md").read_text()
    word, _, whom = end.partition(" to ")
    session = next(pid for pid in below(kit.pid) if "tests.gpu.kit.session" in command_of(pid))
    os.kill(kit.pid if whom == "the kit" else session, getattr(signal, word))
    kit.wait(30)
    until(lambda: report(out)["state"] == "ended early", "the report says so", 20)
    until(lambda: not (alive(daemon) or alive(session)), "all have gone", 20)
    why = "the session ended by SIGKILL" if whom == "its session" else "stopped by SIGTERM"
    assert report(out)["why"] == why
    assert set(by_step(out, "ok")) == {"quick", "waits"}
    assert f"**ended early: {why} (in step waits)**" in (out / "report.md").read_text()
    assert kit.returncode == (-signal.SIGKILL if end == "SIGKILL to the kit" else 1)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_a_step_that_had_to_wait_for_more_important_ones_runs_at_the_end(start: Start, out: Path) -> None:
    kit = start("--minutes", "0.5", "--only", "modest,greedy", **{MORE_STEPS: "tests.kit.gpu_check_steps"})
    shown, _ = kit.communicate(timeout=60)
    assert kit.returncode == 0, shown
    assert [row["step"] for row in report(out)["rows"]] == ["greedy", "modest"]


def test_steps_for_which_no_time_is_left_say_so(start: Start, out: Path) -> None:
    kit = start("--minutes", "0.09", "--only", "quick,release", **{MORE_STEPS: "tests.kit.gpu_check_steps"})
    shown, _ = kit.communicate(timeout=60)
    assert kit.returncode == 1, shown
    skipped = {row["step"]: row["why"] for row in report(out)["rows"] if row["status"] == "skipped"}
    assert skipped["release"].startswith("no time: it needs 20 s, and ")


WHO = """
import os, sys
with open(os.environ["WHO_IMPORTS"], "a") as file:
    print(*sys.orig_argv, file=file)
"""


def test_wheels_reach_the_node_and_hardware_that_is_registered_otherwise_is_shown(
    start: Start, out: Path, tmp_path: Path
) -> None:
    write_wheel(tmp_path, "flowmesh_kit_probe", "1.0", files={"sitecustomize.py": WHO})
    more = {MORE_LINES: "driver 999.1", "WHO_IMPORTS": str(tmp_path / "who")}
    kit = start("--only", "hardware,nonsense", "--wheels", str(tmp_path), **more)
    shown, _ = kit.communicate(timeout=60)
    assert kit.returncode == 1, shown
    failed = {row["step"]: row for row in report(out)["rows"] if row["status"] == "FAILED"}
    assert failed["plan"]["why"].startswith("unknown: nonsense; there are: hardware, fork-servers, release,")
    assert '"driver_version": "999.1"' in failed["hardware"]["evidence"]["registered"]
    assert '"driver_version": "580.159.04"' in failed["hardware"]["evidence"]["nvidia-smi's"]
    assert "-m flowmesh.cli.supervisor" in (tmp_path / "who").read_text()
