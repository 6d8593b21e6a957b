"""Watches vLLM's engine processes: if one dies, vLLM's `generate` waits forever."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

from runners.api import RunnerError

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
        over = threading.Event()
        dead: list[str] = []

        def poll() -> None:
            while not over.wait(POLL_S):
                if (pid := self.died()) is not None:
                    dead.append(str(pid))
                    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
                    return

        def stop(_number: int, _frame: FrameType | None) -> None:
            raise RunnerError(f"a process of vLLM's engine (pid {dead[0]}) died; see the log")

        before = signal.signal(SIGNAL, stop)
        watcher = threading.Thread(target=poll, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            signal.signal(SIGNAL, before)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
