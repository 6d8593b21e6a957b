"""What an open device file says about a fork server: CUDA in it is not safe to fork, NVML is."""

from __future__ import annotations

import pytest

from flowmesh.processes.preload import belongs_to_cuda


@pytest.mark.parametrize("path", ["/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"])
def test_cuda_opens_unified_memory(path: str) -> None:
    assert belongs_to_cuda(path)


@pytest.mark.parametrize("path", ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia12", "/dev/null", "pipe:[7]"])
def test_what_nvml_opens_is_no_sign_of_cuda(path: str) -> None:
    # torch.cuda.is_available() with PYTORCH_NVML_BASED_CUDA_CHECK=1 asks NVML, and xgrammar asks that while imported.
    assert not belongs_to_cuda(path)
