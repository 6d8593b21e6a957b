"""The canary that lets a card back in, on a real one."""

from __future__ import annotations

import pytest

from flowmesh.node.devices import GpuInfo
from tests.gpu.conftest import Script

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
RUN = """
import pathlib, torch
from runners.canary import check_gpu
print(check_gpu(None, pathlib.Path(".")), flush=True)
"""


def test_a_good_card_passes(gpu: GpuInfo, on_gpu: Script) -> None:
    out, _ = on_gpu(RUN).communicate(timeout=120)
    assert out.split()[-1] == "0"


def test_a_card_that_is_not_there_does_not(gpu: GpuInfo, on_gpu: Script) -> None:
    child = on_gpu(RUN, CUDA_VISIBLE_DEVICES="GPU-00000000-0000-0000-0000-000000000000")
    child.communicate(timeout=120)
    assert child.returncode != 0
