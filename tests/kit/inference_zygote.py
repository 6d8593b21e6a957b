"""A small fork server for tests: imports what `argv[1]` names of `preload`, then runs a job in a fork for each line.

A test process has computed with many threads, and a fork of it would hang; this one never computes.
A line of stdin is `[job, file for the answer, whether to wait]`; for each it says the child's pid, and then, if it
waits, that it has ended. As on a node, each child has a session of its own, and nothing of it is left: what vLLM
started there is killed when the child has ended; of one that is not waited for, at the next line or the end of stdin.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import msgspec

from flowmesh.messages.job import Job
from flowmesh.processes.child_main import reseed
from runners.api import Context, RunnerError
from runners.inference import preload

RUNNERS = {
    "inference": "runners.inference.runner:InferenceRunner",
    "embedding": "runners.vectors.runner:EmbeddingRunner",
    "score": "runners.scoring.runner:ScoreRunner",
}


class MarkingContext(Context):
    """Leaves a file for each phase, so that a test knows when to act."""

    def phase(self, name: str) -> None:
        super().phase(name)
        (self.tmp_dir / f"phase-{name}").touch()


def work(job: Job) -> dict[str, object]:
    reseed()  # as a node's child does
    before = frozenset(sys.modules)
    module, _, name = RUNNERS[job.task_type].partition(":")
    try:
        result = getattr(importlib.import_module(module), name)().run(MarkingContext(job))
        return {"result": result, "imported": sorted(sys.modules.keys() - before)}
    except RunnerError as error:
        return {"error": type(error).__name__, "fault": error.fault.value, "message": str(error)}
    except BaseException:  # noqa: BLE001 - a child tells everything
        return {"error": "bug", "message": traceback.format_exc()}


def main() -> None:
    gc.disable()
    for name in getattr(preload, sys.argv[1]):
        importlib.import_module(name)
    if "vllm" in sys.modules:
        from vllm.model_executor.models import registry

        registry._SUBPROCESS_COMMAND = ["false"]  # which imports vLLM to look at a model's class: no task may need that
    gc.enable()
    gc.collect()
    gc.freeze()
    import torch

    print("ready", len(os.listdir("/proc/self/task")), torch.cuda.is_initialized(), flush=True)
    running: set[int] = set()
    try:
        for line in sys.stdin.buffer:
            for pid in [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]]:
                running.discard(pid)
                end_session(pid)
            job, answer, waits = msgspec.json.decode(line, type=tuple[Job, str, bool])
            pid = fork(job, answer)
            print(pid, flush=True)
            if waits:
                os.waitpid(pid, 0)
                end_session(pid)
                print("ended", flush=True)
            else:
                running.add(pid)
    finally:
        for pid in running:
            end_session(pid)


def fork(job: Job, answer: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(f"{answer}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # files, as on a node
        os.dup2(log, 1)
        os.dup2(log, 2)
        whole = Path(f"{answer}.partial")
        whole.write_bytes(msgspec.json.encode(work(job)))
        whole.rename(answer)
        os._exit(0)
    return pid


def end_session(pid: int) -> None:
    """Kill what is left of a child's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
