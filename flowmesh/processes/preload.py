"""What a fork server does before it serves: import, and prove that a fork of the result is safe.

Safe means: one native thread (a lock that another thread held would stay locked in every child), no GPU context (a
forked one is broken), and a first child, the canary, that computed and ended well.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.processes import linux, threads

CANARY_TIMEOUT_S = 120.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float = 0.0
    modules: int = 0
    rss_bytes: int = 0
    packages: tuple[str, ...] = ()
    problem: str = ""
    """Why it must not serve; empty where it may."""
    unsafe: bool = False
    """The imports worked, only a fork of them would not be safe."""


def load(modules: tuple[str, ...], canary: str | None) -> Report:
    """Import `modules`, then look whether forking is safe.

    Args:
        modules: each a module, or `module:NAME`, where NAME there is a tuple of modules.
    """
    began = time.monotonic()
    name = ""
    try:
        for name in _expand(modules):
            importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library raises is its environment's error
        return Report(problem=f"cannot import {name}: {type(error).__name__}: {_one_line(error)}")
    threads.find()
    seconds = time.monotonic() - began
    if problem := unsafe_to_fork() or _run_canary(canary):
        return Report(problem=problem, unsafe=True)
    return Report(seconds=round(seconds, 3), modules=len(sys.modules), rss_bytes=_rss_bytes(), packages=_packages())


def named(target: str) -> Callable[..., Any]:
    """What `module:function` stands for."""
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _expand(modules: tuple[str, ...]) -> Iterator[str]:
    for entry in modules:
        module, _, name = entry.partition(":")
        yield module
        if name:
            yield from getattr(sys.modules[module], name)


def unsafe_to_fork() -> str:
    """The thread or context that makes a fork of this process unsafe; empty where there is none."""
    names = linux.thread_names()
    if len(names) > 1:
        return f"{len(names)} native threads after the imports: {', '.join(names[1:])}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the imports made a CUDA context"
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = str(Path("/proc/self/fd", fd).readlink())
        except OSError:
            continue
        if belongs_to_cuda(path):
            return f"the imports started CUDA (they opened {path})"
    return ""


def belongs_to_cuda(path: str) -> bool:
    """Whether an open file shows that CUDA was started here, which a fork does not survive.

    NVML, which libraries ask for the GPUs there are, keeps /dev/nvidiactl and /dev/nvidia0 … open, and does no harm.
    """
    return path.startswith("/dev/nvidia-uvm")


def _run_canary(target: str | None) -> str:
    if target is None:
        return ""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            linux.die_with_parent(signal.SIGKILL)
            named(target)()
            status = 0
        finally:
            os._exit(status)
    handle = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        ended = bool(poller.poll(CANARY_TIMEOUT_S * 1000))
        if not ended:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(handle)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not ended:
        return f"the canary child ({target}) did not end within {CANARY_TIMEOUT_S:.0f} s"
    return (
        "" if status == 0 else f"the canary child ({target}) ended with {status}; its traceback is in this server's log"
    )


def _packages() -> tuple[str, ...]:
    return tuple(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))


def stamp(folders: tuple[str, ...]) -> tuple[float, ...]:
    """When each folder of packages was last changed: an installer adds and removes entries of it."""
    return tuple(os.stat(folder).st_mtime if os.path.isdir(folder) else 0.0 for folder in folders)  # noqa: PTH112,PTH116


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
