"""Watches vLLM's engine processes: if one dies, vLLM's `generate` waits forever."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import psutil

from runners.api import RunnerError
from runners.inference.interrupt import interrupted

POLL_S = 0.5
SIGNAL = signal.SIGUSR2


def cuda_started() -> bool:
    """Whether CUDA was initialized in this process: it keeps /dev/nvidia-uvm open, which NVML does not."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia-uvm"):  # noqa: PTH115
                return True
    return False


class EngineProcesses:
    """This process's descendants at construction, right after the engine started."""

    def __init__(self) -> None:
        self._processes = psutil.Process().children(recursive=True)

    def died(self) -> int | None:
        """The pid of one that has ended; None: all live."""
        return next((process.pid for process in self._processes if not _alive(process)), None)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Interrupt the body if one of the processes dies. Call it on the main thread.

        Raises:
            RunnerError: a process died.
        """
        if not self._processes:
            yield
            return

        def find(over: threading.Event) -> RunnerError | None:
            over.wait(POLL_S)
            pid = None if over.is_set() else self.died()
            return None if pid is None else RunnerError(f"a process of vLLM's engine (pid {pid}) died; see the log")

        with interrupted(SIGNAL, find):
            yield


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
