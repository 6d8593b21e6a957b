"""A fork server's start: it imports its modules, and checks that it is safe to fork.

It is safe if the process has one native thread (a lock held by another thread would stay locked in every child) and no
GPU context (a forked one is broken), and if its first child, the canary, computed something and exited with 0.
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

from flowmesh.processes import linux, proc_files, threads

CANARY_TIMEOUT_S = 120.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a fork server's start."""

    seconds: float = 0.0
    """How long the imports took."""
    modules: int = 0
    """How many modules the process has now."""
    rss_bytes: int = 0
    packages: tuple[str, ...] = ()
    """The interpreter's folders of installed packages."""
    problem: str = ""
    """Why the server cannot be used; empty if it can."""
    unsafe: bool = False
    """Whether the imports worked, and only forking is not safe."""


def load(modules: tuple[str, ...], canary: str | None, prepare: str | None = None) -> Report:
    """Import `modules`, call `prepare`, then check that forking is safe.

    Args:
        modules: each is a module's name, or `module:NAME`: also import the modules in that module's tuple NAME.
        canary: `module:function` for the canary to call; None: no canary.
        prepare: `module:function` that does what would otherwise be done again in each child.
    """
    began = time.monotonic()
    name = ""
    try:
        for name in _expand(modules):
            importlib.import_module(name)
        if prepare is not None:
            named(name := prepare)()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library raises is its environment's error
        what = "call" if name == prepare else "import"
        return Report(problem=f"cannot {what} {name}: {type(error).__name__}: {_one_line(error)}")
    threads.find()
    seconds = time.monotonic() - began
    if problem := unsafe_to_fork() or _run_canary(canary):
        return Report(problem=problem, unsafe=True)
    return Report(seconds=round(seconds, 3), modules=len(sys.modules), rss_bytes=_rss_bytes(), packages=_packages())


def named(target: str) -> Callable[..., Any]:
    """Import `module` and return its `function`, from `module:function`."""
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
    """Why a fork of this process is not safe: its threads, or its GPU context. Empty if it is safe."""
    names = proc_files.thread_names()
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
    """Whether a process that has this file open has initialised CUDA, which does not work in its forks.

    NVML keeps /dev/nvidiactl and /dev/nvidia0 … open; libraries use it to list GPUs, and it is safe to fork.
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
    """When each folder of packages was last modified, in seconds since the epoch; 0 if it does not exist.

    An installer adds and removes entries, and so changes it.
    """
    return tuple(os.stat(folder).st_mtime if os.path.isdir(folder) else 0.0 for folder in folders)  # noqa: PTH112,PTH116


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
