"""One rank of a group: its place, its process group, and its report to the parent process."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from flowmesh.messages.job import ArchiveRequest, Fault
from runners.api import Cancelled, Context, RunnerError
from runners.training import costs
from runners.training.devices import Device
from runners.training.faults import explain
from runners.training.progress import Agreement, alone

DEFAULT_TIMEOUT_S = 1800
"""How long a rank waits for the others in one operation, unless trainer_args.ddp_timeout says otherwise."""
TERMINATED = "terminated by the node"
_PR_SET_PDEATHSIG = 1


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Position of a process in its group."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def leads_node(self) -> bool:
        """Whether it has the task's pipe."""
        return self.local_rank == 0

    @property
    def leads(self) -> bool:
        """Whether it writes the group's results."""
        return self.rank == 0

    @property
    def on_first_node(self) -> bool:
        """Whether it shares a file system with rank 0."""
        return self.rank < self.local_world


def threads(ctx: Context, place: Place) -> int:
    """Threads of this rank. More threads than cores were measured to make a step ten times slower."""
    return max(1, ctx.threads // place.local_world)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a rank ended, as written by itself."""

    rank: int
    ok: bool
    when: float
    """Monotonic seconds; comparable between the ranks of one machine."""
    result: dict[str, Any] | None = None
    fault: Fault | None = None
    message: str = ""
    detail: str = ""
    checkpoint: bool = False
    """Whether a checkpoint was written before the cancel took effect."""
    phases: dict[str, float] = {}
    archives: tuple[ArchiveRequest, ...] = ()
    warnings: tuple[str, ...] = ()
    peak_host_bytes: int = 0
    peak_gpu_bytes: int = 0


def report_path(folder: Path, local_rank: int) -> Path:
    return folder / f"rank-{local_rank}.json"


def read_report(folder: Path, local_rank: int) -> Report | None:
    """The report of a rank of this node; None if it exited without one."""
    try:
        return msgspec.json.decode(report_path(folder, local_rank).read_bytes(), type=Report)
    except FileNotFoundError:
        return None


def serve(place: Place, ctx: Context, folder: Path, work: Callable[[Place, Context], dict[str, Any]]) -> NoReturn:
    """Run `work`, write the report to `folder`, and exit without the interpreter's teardown."""
    signal.signal(signal.SIGTERM, _terminated)
    report = attempt(place, ctx, work)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path = report_path(folder, place.local_rank)
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(report))
    partial.rename(path)
    if report.ok:
        _leave_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0 if report.ok else 1)


def attempt(place: Place, ctx: Context, work: Callable[[Place, Context], dict[str, Any]]) -> Report:
    """Run `work` and report its result or exception."""
    fault, message, detail, result, checkpoint = None, "", "", None, False
    try:
        result = work(place, ctx)
    except Cancelled as error:
        fault, message, checkpoint = Fault.CANCELLED, error.reason, error.checkpoint
        if message == TERMINATED:
            traceback.print_exc()  # the others may have waited for this rank: log where it was
    except BaseException as error:  # noqa: BLE001 - everything goes into the report
        clear = error if isinstance(error, RunnerError) else explain(error, "ran")
        fault = clear.fault if clear is not None else Fault.ERROR
        message = str(clear) if clear is not None else f"{type(error).__name__}: {' '.join(str(error).split())}"
        detail = "" if fault in (Fault.BAD_REQUEST, Fault.MISSING_DEPENDENCY) else traceback.format_exc()
        print(detail or message, file=sys.stderr)  # noqa: T201 - stderr is the rank's log
    ctx.finish()
    return Report(
        rank=place.rank,
        ok=fault is None,
        when=time.monotonic(),
        result=result,
        fault=fault,
        message=message,
        detail=detail,
        checkpoint=checkpoint,
        phases=ctx.phases,
        archives=tuple(ctx.archives),
        warnings=tuple(ctx.warnings),
        peak_host_bytes=costs.peak_host_bytes(),
        peak_gpu_bytes=costs.peak_gpu_bytes(),
    )


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` exits. Exits at once if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def redirect(folder: Path) -> None:
    """Redirect stdout and stderr to this rank's own files, named as torchelastic does."""
    folder.mkdir(parents=True, exist_ok=True)
    for fd, name in ((1, "stdout.log"), (2, "stderr.log")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o640)
        os.dup2(file, fd, inheritable=True)
        os.close(file)


def join(place: Place, device: Device, store: tuple[socket.socket, int] | None, timeout_s: int) -> None:
    """Join the process group.

    Args:
        store: rank 0's socket for the store, bound by the parent of all ranks, and its port; None: use torchrun's
            variables.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device.cuda else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    leads = place.rank == 0
    kept = dist.TCPStore(
        "127.0.0.1",
        store[1],
        place.world,
        is_master=leads,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=store[0].detach() if leads else None,
    )
    dist.init_process_group(backend, store=kept, rank=place.rank, world_size=place.world, timeout=timeout)


def agreement(place: Place) -> Agreement:
    """The maximum over ranks, on a separate gloo group, so that no GPU waits for it."""
    if place.world == 1:
        return alone
    import torch
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")

    def agree(value: int) -> int:
        number = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
        return int(number.item())

    return agree


def _leave_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def _terminated(_number: int, _frame: Any) -> NoReturn:
    raise Cancelled(TERMINATED)
