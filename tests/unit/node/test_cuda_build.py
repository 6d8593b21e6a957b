"""Driver, GPUs and an environment's torch: which builds fit, and what is said where they do not."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flowmesh.node.cuda_build import Mismatch, TorchBuild, ask, mismatches, runs_on
from flowmesh.node.devices import GpuInfo, Inventory

CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_90")


def machine(driver: str, cuda: str, *capabilities: tuple[int, int]) -> Inventory:
    gpus = tuple(
        GpuInfo(index=at, uuid=f"GPU-{at}", name="Card", memory_total_bytes=1, capability=each)
        for at, each in enumerate(capabilities)
    )
    return Inventory(gpus=gpus, driver_version=driver, cuda_version=cuda)


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (CUDA_13, (6, 1), False),
        (CUDA_13, (7, 0), False),
        (CUDA_13, (7, 5), True),
        (CUDA_13, (8, 9), True),
        (CUDA_13, (9, 0), True),
        (CUDA_13, (12, 0), True),
        (CUDA_13, (13, 0), True),
        (CUDA_12, (6, 1), True),
        (CUDA_12, (12, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_90a",), (9, 1), False),
        (("sm_100f",), (10, 3), True),
        (("compute_70",), (9, 0), True),
        (("compute_90a",), (10, 0), False),
        (("sm_86",), (8, 0), False),
        (("strange",), (8, 0), False),
    ],
)
def test_which_code_runs_where(archs: tuple[str, ...], capability: tuple[int, int], fits: bool) -> None:
    assert runs_on(archs, capability) is fits


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        ("535.216", "12.2", "built for CUDA 13.0, and driver 535.216 supports CUDA up to 12.2: it would see no GPU"),
        ("570.10", "12.8", "built for CUDA 13.0, and driver 570.10 supports CUDA up to 12.8: it would see no GPU"),
        ("580.65", "13.0", None),
        ("590.1", "14.0", None),
    ],
)
def test_drivers(driver: str, cuda: str, said: str | None) -> None:
    found = mismatches(TorchBuild("2.13.0", "13.0", CUDA_13), machine(driver, cuda, (9, 0)), "/py")
    if said is None:
        assert found == []
        return
    (only,) = found
    assert said in only.text
    assert only.remedy.startswith("install driver 580 or newer; or a build of torch for CUDA 12")


def test_cards_that_a_build_has_no_code_for_are_named() -> None:
    here = machine("580.65", "13.0", (6, 1), (9, 0), (7, 0))
    (only,) = mismatches(TorchBuild("2.13.0", "13.0", CUDA_13), here, "/py")
    assert "GPU 0 Card (compute capability 6.1), GPU 2 Card (compute capability 7.0)" in only.text
    assert "GPU 1" not in only.text
    assert "CUDA_VISIBLE_DEVICES" in only.remedy
    both = mismatches(TorchBuild("2.13.0", "13.0", CUDA_13), machine("535.1", "12.2", (7, 0)), "/py")
    assert len(both) == 2


def test_what_the_driver_does_not_tell_is_not_held_against_it() -> None:
    gpu = GpuInfo(index=0, uuid="GPU-0", name="Card", memory_total_bytes=1)
    here = Inventory(gpus=(gpu,), driver_version="580", cuda_version=None)
    assert mismatches(TorchBuild("2", "13.0", CUDA_13), here, "/py") == []


def interpreter(folder: Path, version: str, init: str = "") -> str:
    """An interpreter with a torch of the test's own before all others."""
    package = folder / "torch"
    package.mkdir()
    (package / "version.py").write_text(version)
    (package / "__init__.py").write_text(init)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_an_interpreter_is_asked(tmp_path: Path) -> None:
    init = "print('noise')\nclass _C:\n    _cuda_getArchFlags = staticmethod(lambda: 'sm_80 sm_90 compute_90')\n"
    python = interpreter(tmp_path, "__version__ = '9.1'\ncuda = '13.0'\n", init)
    assert ask(python) == TorchBuild("9.1", "13.0", ("sm_80", "sm_90", "compute_90"))


def test_a_build_without_cuda_is_not_imported(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "__version__ = '9.1+cpu'\ncuda = None\n", "raise SystemExit(9)")
    build = ask(python)
    assert build == TorchBuild("9.1+cpu", None)
    (only,) = mismatches(build, machine("580", "13.0", (9, 0)), python)
    assert only.text == "torch 9.1+cpu is built without CUDA: its tasks run on the CPU"


def test_a_torch_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "__version__ = '1'\ncuda = '13.0'\n", "raise OSError('libcudart.so.13 is missing')")
    found = ask(python)
    assert isinstance(found, Mismatch)
    assert found.text == "torch cannot be imported: OSError: libcudart.so.13 is missing"
    assert isinstance(ask(str(tmp_path / "nothing")), Mismatch)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_torch_that_is_here() -> None:
    build = ask(sys.executable)
    assert isinstance(build, TorchBuild)
    assert build.version.startswith("2.")
