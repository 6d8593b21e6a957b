"""The kit's own tasks. In a dry run they compute on the CPU, and tell the stub of the driver what they would hold."""

from __future__ import annotations

import os
import time
from typing import Any

from runners.api import Context, Runner, RunnerError

SIDE = 8192
DRY_SIDE = 64
STUB = "FLOWMESH_NVML_STUB"


class KitRunner(Runner):
    """Does what `spec.do` names."""

    def run(self, ctx: Context) -> dict[str, Any]:
        entered_at = time.monotonic()
        work = getattr(self, f"_{ctx.spec['do']}")
        found = work(ctx, device_of(ctx))
        return {
            "ok": True,
            "entered_at": entered_at,
            "left_at": time.monotonic(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            **found,
        }

    def _nothing(self, ctx: Context, device: str) -> dict[str, Any]:
        """Nothing: its fork server had to import its libraries for it."""
        return {}

    def _kernel(self, ctx: Context, device: str) -> dict[str, Any]:
        """A first kernel, and whether it computed right."""
        import torch

        began = time.monotonic()
        ones = torch.ones(512, 512, device=device)
        right = float((ones @ ones).sum()) == 512.0**3
        return {
            "right": right,
            "first_kernel_s": time.monotonic() - began,
            "devices": torch.cuda.device_count(),
            "pid": os.getpid(),
        }

    def _hold(self, ctx: Context, device: str) -> dict[str, Any]:
        """Holds `spec.bytes` until it is stopped, or for `spec.seconds`."""
        block = _take(ctx, device, ctx.spec["bytes"])
        ctx.phase("holding")
        ctx.sleep(ctx.spec.get("seconds", 600))
        return {"bytes": block}

    def _burn(self, ctx: Context, device: str) -> dict[str, Any]:
        """Multiplies matrices for `spec.seconds`."""
        import torch

        dry = device == "cpu"
        side = DRY_SIDE if dry else SIDE
        left = torch.randn(side, side, device=device, dtype=torch.float32 if dry else torch.bfloat16)
        _finish(device)
        ctx.phase("burning")
        products, ends_at = 0, time.monotonic() + ctx.spec["seconds"]
        while time.monotonic() < ends_at:
            for _ in range(20):
                left @ left
            products += 20
            _finish(device)
            ctx.check_cancelled()
            if dry:
                time.sleep(0.05)
        return {"products": products, "flop": products * 2 * side**3}

    def _load(self, ctx: Context, device: str) -> dict[str, Any]:
        """Takes `spec.bytes` as a model would, and ends."""
        began = time.monotonic()
        _take(ctx, device, ctx.spec["bytes"])
        return {"load_s": time.monotonic() - began}

    def _trespass(self, ctx: Context, device: str) -> dict[str, Any]:
        """Reads and writes far outside its memory: Xid 31."""
        import torch

        if device == "cpu":
            _tell_stub(f"event {time.time_ns()} {ctx.gpus[0]} 8 31")
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        one = torch.zeros(256, device=device)

        class Far:
            __cuda_array_interface__ = {  # noqa: RUF012 - CUDA's protocol
                "shape": (1 << 40,),
                "typestr": "<f4",
                "data": (one.data_ptr(), False),
                "version": 3,
                "strides": None,
            }

        far = torch.as_tensor(Far(), device=device)
        far[1 << 38 : (1 << 38) + 1024].add_(1)
        torch.cuda.synchronize()
        return {"wrong": "the access did not fail"}

    def _overfill(self, ctx: Context, device: str) -> dict[str, Any]:
        """Takes more than the card has."""
        import torch

        if device == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        held = []
        while True:
            held.append(torch.ones(4 << 30, dtype=torch.uint8, device=device))

    def _canary(self, ctx: Context, device: str) -> dict[str, Any]:
        """The check that lets a card back in after a fault."""
        from runners.canary import check, check_gpu

        if device == "cpu":
            check()
            return {"status": 0}
        return {"status": check_gpu(None, ctx.out_dir)}


def device_of(ctx: Context) -> str:
    """
    Raises:
        RunnerError: torch sees no GPU although the task has one, and the run is not dry.
    """
    import torch

    if not ctx.gpus:
        return "cpu"
    if torch.version.cuda and torch.cuda.is_available():
        return "cuda"
    if ctx.spec.get("dry"):
        return "cpu"
    raise RunnerError("torch cannot use CUDA here: a CPU build, or no device")


def _take(ctx: Context, device: str, count: int) -> int:
    """Allocate and write so many bytes; they stay until the process ends."""
    import torch

    if device == "cpu":
        _tell_stub(f"holder {ctx.gpus[0]} {os.getpid()} {count}")
        return count
    _HELD.append(torch.empty(count, dtype=torch.uint8, device=device).fill_(1))
    _finish(device)
    return count


_HELD: list[Any] = []


def _finish(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _tell_stub(line: str) -> None:
    with open(os.environ[STUB], "a") as script:
        script.write(line + "\n")
