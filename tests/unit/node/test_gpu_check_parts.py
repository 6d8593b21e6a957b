"""Parts of `scripts/gpu-check`: how minutes are shared out, what is installed, and what may travel."""

from __future__ import annotations

import asyncio
import re
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.gpu.kit import install, pack, steps
from tests.gpu.kit.budget import Share, seconds_for
from tests.gpu.kit.report import Report, Row, Status
from tests.kit.nvml_stub.harness import Stub, run_with_stub
from tests.kit.paths import ROOT
from tests.kit.wheels import write_wheel


def share(name: str, priority: int, most_s: float, least_s: float = 1) -> Share:
    return Share(name=name, priority=priority, most_s=most_s, least_s=least_s)


def test_a_step_leaves_later_ones_what_their_priority_asks() -> None:
    later = [share("first", 1, 50), share("same", 2, 40, 5), share("last", 3, 30)]
    assert seconds_for(share("now", 2, 20), later, 500) == 20
    assert seconds_for(share("now", 2, 20, 3), later, 70) == 15
    assert seconds_for(share("now", 2, 20, 16), later, 70) == 0
    assert seconds_for(share("now", 1, 20), later, 12) == 11


def test_eight_minutes_are_enough_for_each_step_to_begin() -> None:
    """Even where each takes all that it may, what matters most is never left out."""
    left_s, table = 8 * 60.0, [step.share for step in steps.STEPS]
    begun = set()
    for at, each in enumerate(table):
        if seconds := seconds_for(each, table[at + 1 :], left_s):
            begun.add(each.name)
            left_s -= seconds
    assert begun >= {each.name for each in table if each.priority < 3}
    assert left_s >= 0


def test_only_what_is_missing_or_does_not_fit_is_installed(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert "no folder wheels-not-here" in install.install(ROOT, tmp_path / "wheels-not-here", tmp_path / "site")
    write_wheel(wheels, "flowmesh_kit_probe", "1.0")
    here = write_wheel(wheels, "redis", metadata.version("redis"))
    assert install.install(ROOT, wheels, tmp_path / "site") == "flowmesh-kit-probe==1.0"
    assert (tmp_path / "site" / "flowmesh_kit_probe" / "__init__.py").is_file()
    assert not (tmp_path / "site" / "redis").exists()
    wanted = install.requirements(ROOT)
    assert install.lacking([here], wanted) == []
    wanted["redis"] = install.Requirement("redis>=999")
    assert install.lacking([here], wanted) == [here]
    (wheels / "flowmesh_kit_probe-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(install.SetUpError, match="pip ended with"):
        install.install(ROOT, wheels, tmp_path / "other")


def test_what_does_not_fit_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pack"
    unneeded = 'async-timeout; python_full_version < "3.11.3"'
    small = write_wheel(tmp_path, "redis", "8.1.0", needs=(unneeded,))
    assert pack.keep([small], folder) == 0
    assert [each.name for each in folder.iterdir()] == [small.name]
    assert "1 wheels, of 50 MiB that may travel" in capsys.readouterr().out
    large = tmp_path / "trl-1.0-py3-none-any.whl"
    small.replace(large)
    with open(large, "ab") as file:
        file.truncate(pack.LIMIT_BYTES + 1)
    with zipfile.ZipFile(large, "a") as archive:  # its directory is at the end again
        archive.writestr("trl-1.0.dist-info/METADATA", "Name: trl\nRequires-Dist: torch\n")
    assert pack.keep([large], folder) == 1
    assert "too large: nothing was written" in capsys.readouterr().err
    assert [each.name for each in folder.iterdir()] == [small.name], "what was packed before stays"
    odd = write_wheel(tmp_path, "rich", "15.0", needs=("a-package-that-nobody-has",))
    assert pack.keep([odd], folder) == 1
    assert "rich: a-package-that-nobody-has" in capsys.readouterr().err


def test_all_that_is_packed_has_a_tested_version() -> None:
    pins = pack.tested(ROOT / "constraints" / "py3.11.txt")
    assert [name for name in pack.PACKED if pack.canonicalize_name(name) not in pins] == []
    assert set(install.requirements(ROOT)) <= {pack.canonicalize_name(name) for name in pack.PACKED}


def test_a_report_that_passed_nothing_is_not_all_right(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    report.add(Row(step="a", what="b", status=Status.SKIPPED, why="c"))
    report.end("finished")
    assert not report.passed
    report.add(Row(step="a", what="b", status=Status.OK))
    assert report.passed
    report.end("ended early", "why")
    assert not report.passed


def test_the_stub_notes_calls_that_would_change_a_device() -> None:
    async def body(stub: Stub) -> None:
        import os

        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetMemoryInfo(device)
        changes = Path(f"{os.environ['FLOWMESH_NVML_STUB']}.changes")
        assert not changes.exists()
        pynvml.nvmlDeviceSetPersistenceMode(device, 1)
        pynvml.nvmlDeviceSetGpuLockedClocks(device, 1, 2)
        assert changes.read_text().split() == ["nvmlDeviceSetPersistenceMode", "nvmlDeviceSetGpuLockedClocks"]

    run_with_stub("gpu GPU-aaaa 80000000000 NVIDIA H100", body)


def test_holders_use_memory_as_long_as_they_live() -> None:
    async def body(stub: Stub) -> None:
        import os

        from flowmesh.node.nvml.client import Nvml

        nvml = Nvml()
        child = await asyncio.create_subprocess_exec("sleep", "60")
        stub.add("set GPU-aaaa used 5", f"holder GPU-aaaa {child.pid} 100", f"holder GPU-bbbb {os.getpid()} 7")
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert (look.used_bytes, look.pids) == (105, {child.pid})  # type: ignore[union-attr]
        child.kill()
        await child.wait()
        look = (await nvml.sample(["GPU-aaaa"]))["GPU-aaaa"]
        assert (look.used_bytes, look.pids) == (5, frozenset())  # type: ignore[union-attr]
        await nvml.close()

    run_with_stub("gpu GPU-aaaa 80000000000 NVIDIA H100\ngpu GPU-bbbb 80000000000 NVIDIA H100", body)


FORBIDDEN = re.compile(
    r"nvmlDevice(?:Set|Reset|Clear|Create)|nvmlGpuInstance|[cC]udaMallocManaged|cuMemAllocManaged|cudaDeviceReset"
)
"""What would change a device. nvidia-smi's ways to do so end in the dry run's file of changes."""


def test_neither_the_node_nor_the_kit_sets_or_resets_anything() -> None:
    files = [each for folder in ("flowmesh", "runners", "tests/gpu") for each in (ROOT / folder).rglob("*.py")]
    files.append(ROOT / "scripts" / "gpu-check")
    assert [f"{each.relative_to(ROOT)}" for each in files if FORBIDDEN.search(each.read_text())] == []
    assert FORBIDDEN.search("pynvml.nvmlDeviceSetPersistenceMode(device, 1)")
