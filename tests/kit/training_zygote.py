"""Runs training tasks as the node does: forked from a process that has imported the libraries, over a real pipe.

As a script it is that process: one thread, started once a test session; each request is a fork with a child of
`runners.child`, so that a task's seconds are its own and nothing of it stays in the tests' process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.job import JOB_FILE, OUTCOME_FILE, Job, Outcome
from flowmesh.processes.environ import SERVER
from flowmesh.processes.pipe import Cancel, Frame, Pipe
from runners.training.preload import TRAINING

THREADS = 1


class Zygote:
    """The forking process, seen from the tests."""

    def __init__(self, log: Path, hub: Path) -> None:
        """
        Args:
            hub: what its tasks take for the model hub's cache.
        """
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.training_zygote", str(far.fileno())],
                pass_fds=(far.fileno(),),
                env={**os.environ, **SERVER, "HF_HUB_CACHE": str(hub)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        far.close()
        self._socket = near
        ready = self._socket.recv(4096)
        assert ready, log.read_text()
        self.threads = json.loads(ready)["threads"]

    def fork(self, spool: Path, pipe: Pipe) -> int:
        socket.send_fds(self._socket, [str(spool).encode()], [pipe.fileno()])
        pipe.close()
        return int(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
        self.process.wait(10)


class Running:
    """A task that runs."""

    def __init__(self, zygote: Zygote, job: Job, spool: Path) -> None:
        spool.mkdir(parents=True, exist_ok=True)
        (spool / JOB_FILE).write_bytes(msgspec.json.encode(job))
        self.out_dir = Path(job.out_dir)
        self.spool = spool
        self.frames: list[Frame] = []
        self.pipe, far = Pipe.pair()
        self.pid = zygote.fork(spool, far)
        self.handle = os.pidfd_open(self.pid)

    def next_frame(self, timeout_s: float = 60) -> Frame | None:
        """The next frame; None at the pipe's end."""
        if not self.pipe.wait(timeout_s):
            raise AssertionError(f"nothing within {timeout_s} s; {self.log()}")
        try:
            frame = self.pipe.poll()
        except EOFError:
            return None
        if frame is not None:
            self.frames.append(frame)
        return frame

    def wait_for(self, wanted: Any, timeout_s: float = 60) -> Any:
        """Read on until a frame for which `wanted` is true."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            frame = self.next_frame(max(deadline - time.monotonic(), 0))
            if frame is None:
                raise AssertionError(f"it ended first; {self.log()}")
            if wanted(frame):
                return frame
        raise AssertionError(f"not within {timeout_s} s; {self.log()}")

    def cancel(self, *, checkpoint: bool = False) -> None:
        self.pipe.send(Cancel("cancelled by a test", checkpoint=checkpoint))

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        signal.pidfd_send_signal(self.handle, number)

    def ended(self, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self.handle, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def wait(self, timeout_s: float = 90) -> Outcome:
        """The outcome, when the child is gone."""
        if not self.ended(timeout_s):
            self.kill()
            raise AssertionError(f"it did not end within {timeout_s} s; {self.log()}")
        while True:
            try:
                if (frame := self.pipe.poll()) is None:
                    break
            except EOFError:
                break
            self.frames.append(frame)
        self.pipe.close()
        os.close(self.handle)
        path = self.spool / OUTCOME_FILE
        if not path.is_file():
            raise AssertionError(f"it left no outcome; {self.log()}")
        return msgspec.json.decode(path.read_bytes(), type=Outcome)

    def log(self) -> str:
        return (self.spool / "log").read_text(errors="replace")[-6000:] if (self.spool / "log").exists() else "no log"


def main(fd: int) -> None:
    gc.disable()
    for name in TRAINING:
        importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()  # as a node's fork server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; outcomes are in files
    channel = socket.socket(fileno=fd)
    channel.send(json.dumps({"threads": len(os.listdir("/proc/self/task"))}).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 65536, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            child(Path(data.decode()), Pipe(socket.socket(fileno=fds[0])))
        os.close(fds[0])
        channel.send(str(pid).encode())


def child(spool: Path, pipe: Pipe) -> None:
    status = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(spool / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        from runners import child as entry

        torch.set_num_threads(THREADS)
        status = entry.main(pipe, spool)
    except BaseException:  # noqa: BLE001 - whatever it is belongs into the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
