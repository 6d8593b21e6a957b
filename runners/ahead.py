"""The main functions of a child that prepares a task while another one has its slot.

It downloads what the document names into the node's cache, and has the kernel read the files of models and data into
its own. The task then starts as any other, and finds both warm. Nothing else passes from here to the task, so nothing
that happens here can make its result wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import psutil

from flowmesh.messages.job import JOB_FILE, Job
from flowmesh.processes.pipe import Pipe
from runners.api import Cancelled, Context, Later, Preparation, RunnerError
from runners.child import runner_of

STEP_BYTES = 8 << 20
SHARE = 0.25
"""At most this part of the memory that is available is read: what the running task has in the kernel's cache stays."""
LEAST_FREE = 0.2
"""Reading ends where less than this part of the machine's memory is available."""
OTHER_WEIGHTS = re.compile(r"\.(bin|pt|pth|h5|ot|msgpack|onnx|gguf)$")
"""Not read beside safetensors, which every loader prefers."""
NOT_READ = re.compile(r"checkpoint-\d+|optimizer.*|scheduler.*|rng_state.*|onnx|openvino|original|runs|logs|\..*")
"""Names in a model's folder that loading does not touch."""


def everything(pipe: Pipe, spool: Path) -> int:
    """Prepare the job in `spool`, of a task that will run here; returns the exit status, 0."""
    return _main(pipe, spool, downloads=True)


def what_is_here(pipe: Pipe, spool: Path) -> int:
    """Prepare the job of a task that another node may yet take: nothing is downloaded. Returns 0."""
    return _main(pipe, spool, downloads=False)


def _main(pipe: Pipe, spool: Path, *, downloads: bool) -> int:
    be_modest()
    job = msgspec.json.decode((spool / JOB_FILE).read_bytes(), type=Job)
    ctx = Context(job, pipe)
    ctx.unpacks, ctx.downloads = False, downloads
    reader = Reader(ctx, most_bytes=int(psutil.virtual_memory().available * SHARE))
    try:
        for part in runner_of(job.runner).ahead(ctx):
            prepare(ctx, part, reader)
    except RunnerError as error:  # of the document as a whole
        ctx.log.info("not prepared: %s", error)
    except Cancelled:
        return 0
    ctx.progress(reader.read_bytes, reader.read_bytes, unit="bytes")
    ctx.log.info("prepared task=%s read_mb=%d", job.task_id, reader.read_bytes >> 20)
    return 0


def prepare(ctx: Context, part: Preparation, reader: Reader) -> None:
    """Do one part. An error is the task's own: it meets it again, and reports it."""
    try:
        for path in part():
            reader.read(path)
    except Later as later:
        if later.path is not None:
            reader.read(later.path)
    except (RunnerError, OSError) as error:
        ctx.log.info("left to the task: %s", error)


def be_modest() -> None:
    """Take only what no other process wants of CPUs and disks."""
    os.nice(15)  # not SCHED_IDLE: on a busy machine such a process takes seconds to die, and its locks with it
    with contextlib.suppress(psutil.Error, OSError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


class Reader:
    """Reads files into the kernel's cache.

    Args:
        most_bytes: of all files together.
    """

    def __init__(self, ctx: Context, *, most_bytes: int) -> None:
        self.read_bytes = 0
        self._ctx = ctx
        self._left = most_bytes

    def read(self, path: Path) -> None:
        """Read a file, or what a loader reads of a folder.

        Raises:
            Refused: something outside of what documents may read.
            Cancelled: the node asks this process to end.
        """
        for file in files_of(path) if path.is_dir() else [path]:
            with self._ctx.reach.opened(file) as name, name.open("rb", buffering=0) as opened:
                self._read(opened.fileno())

    def _read(self, fd: int) -> None:
        """Without a copy to this process: the kernel reads a step ahead, and its last byte shows that it has."""
        size = os.fstat(fd).st_size
        for start in range(0, size, STEP_BYTES):
            step = min(STEP_BYTES, size - start)
            memory = psutil.virtual_memory()
            if self._left < step or memory.available < LEAST_FREE * memory.total:
                return
            os.posix_fadvise(fd, start, step, os.POSIX_FADV_WILLNEED)
            os.pread(fd, 1, start + step - 1)
            self._left -= step
            self.read_bytes += step
            self._ctx.progress(self.read_bytes, unit="bytes")


def files_of(folder: Path) -> Iterator[Path]:
    """The files that loading a model or an index reads, by name; also those of a model's parts one level below."""
    found = list(_visible(folder))
    safe = any(path.suffix == ".safetensors" for path in found)
    for path in found:
        if path.is_dir():
            yield from (each for each in _visible(path) if each.is_file() and _is_wanted(each, safe=safe))
        elif _is_wanted(path, safe=safe):
            yield path


def _visible(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if NOT_READ.fullmatch(path.name) is None)


def _is_wanted(path: Path, *, safe: bool) -> bool:
    return path.is_file() and not (safe and OTHER_WEIGHTS.search(path.name))
