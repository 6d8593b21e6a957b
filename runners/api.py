"""What a runner is given and what it may raise. Every runner, ours or another package's, is written against this.

A runner is a class with one method, `run(ctx) -> dict`; the dict is the task's result. It runs in a fresh process of
its own, on the main thread, with stdout and stderr already going to the task's logs.
"""

from __future__ import annotations

import abc
import logging
import time
from pathlib import Path
from typing import Any, TypeVar

from flowmesh.messages.checking import FieldError, convert
from flowmesh.messages.job import ArchiveRequest, Fault, Job, UploadRequest
from flowmesh.processes.pipe import Cancel, FrameError, Phase, Pipe, Progress

PROGRESS_INTERVAL_S = 0.1
"""Progress between two ticks of this is not sent: nobody reads faster, and the pipe stays free."""

T = TypeVar("T")


class RunnerError(Exception):
    """A run failed, and it is not the task's author who can mend it. The message is the task's one line."""

    fault = Fault.ERROR


class BadRequest(RunnerError):
    """The task asks for something that cannot be done. The message names the field and the remedy."""

    fault = Fault.BAD_REQUEST


class MissingDependency(BadRequest):
    """A library that the task needs is not installed in its environment."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed in this environment: pip install 'flowmesh-supervisor[{extra}]'")


class Cancelled(BaseException):
    """The node asked this task to stop. Not an Exception, so that a runner's own handlers let it pass."""

    def __init__(self, reason: str = "cancelled", *, checkpoint: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.checkpoint = checkpoint


class Context:
    """A runner's view of its task and its node."""

    def __init__(self, job: Job, pipe: Pipe | None = None) -> None:
        self.job = job
        self.task_id = job.task_id
        self.spec: dict[str, Any] = job.task.get("spec") or {}
        self.merge_children: list[dict[str, Any]] = job.task.get("merge_children") or []
        self.out_dir = Path(job.out_dir)
        self.artifacts_dir = self.out_dir / "artifacts"
        self.results_dir = Path(job.results_dir)
        self.cache_dir = Path(job.cache_dir)
        self.tmp_dir = Path(job.tmp_dir)
        self.gpus = job.gpus
        self.threads = job.threads
        self.log = logging.getLogger(f"flowmesh.task.{job.task_type}")
        self.archives: list[ArchiveRequest] = []
        self.uploads: list[UploadRequest] = []
        self.phases: dict[str, float] = {}
        self._pipe = pipe
        self._cancel: Cancel | None = None
        self._phase: tuple[str, float] | None = None
        self._last_progress = 0.0

    @property
    def pipe(self) -> Pipe | None:
        """The task's own pipe, for a runner that has ranks report over it; None outside a node."""
        return self._pipe

    # ---- the task's document -------------------------------------------------------------------------------------

    def section(self, name: str, into: type[T]) -> T:
        """`spec.<name>` as a struct, `{}` where the task has none.

        Raises:
            BadRequest: naming the field, what was found, and what is allowed.
        """
        return self.check(self.spec.get(name) or {}, into, f"spec.{name}")

    @staticmethod
    def check(value: Any, into: type[T], where: str) -> T:
        """`value` as a struct of type `into`; `where` is the value's dotted path in the task.

        Raises:
            BadRequest: naming the field, what was found, and what is allowed.
        """
        try:
            return convert(value, into, where=where)
        except FieldError as error:
            raise BadRequest(str(error)) from None

    # ---- what the node hears -------------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """Enter a phase (`load`, `generate`, `train`, `save` …). Its seconds are in the task's event."""
        self._close_phase()
        self._phase = (name, time.monotonic())
        if self._pipe is not None:
            self._pipe.send(Phase(name), drop=True)

    def progress(self, done: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        """Tell how far the task is. Cheap enough for an inner loop. Also where a cancel takes effect.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        self.check_cancelled()
        now = time.monotonic()
        if now - self._last_progress < PROGRESS_INTERVAL_S and done != total:
            return
        self._last_progress = now
        if self._pipe is not None:
            self._pipe.send(Progress(done, total, unit, metrics), drop=True)

    def archive(self, folder: str) -> None:
        """Have the top-level `folder` of out_dir packed and uploaded, under HTTP delivery; a no-op otherwise."""
        if self.job.delivers_http:
            self.archives.append(ArchiveRequest(folder=folder))

    def upload(self, path: str, field: str, child: str | None = None) -> None:
        """Have a file of out_dir uploaded, under HTTP delivery: `result[field]` gets its url. A no-op otherwise."""
        if self.job.delivers_http:
            self.uploads.append(UploadRequest(path=path, field=field, child=child))

    # ---- what the node asks --------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> Cancel | None:
        """The node's request to stop, or None. One system call; poll it as often as you like."""
        if self._cancel is None and self._pipe is not None:
            try:
                frame = self._pipe.poll()
            except (EOFError, FrameError):
                frame = None
            if isinstance(frame, Cancel):
                self._cancel = frame
        return self._cancel

    def check_cancelled(self) -> None:
        """Raises Cancelled where the node asked the task to stop."""
        request = self.cancelled
        if request is not None:
            raise Cancelled(request.reason, checkpoint=request.checkpoint)

    def sleep(self, seconds: float) -> None:
        """Wait, and wake at once for a cancel.

        Raises:
            Cancelled: the node asked the task to stop.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check_cancelled()
            if self._pipe is None:
                time.sleep(left)
            else:
                self._pipe.wait(left)
        self.check_cancelled()

    def _close_phase(self) -> None:
        if self._phase is not None:
            name, since = self._phase
            self.phases[name] = round(self.phases.get(name, 0.0) + time.monotonic() - since, 6)
            self._phase = None

    def finish(self) -> None:
        """Close the last phase's clock. Called by the child when the runner has returned or raised."""
        self._close_phase()


class Runner(abc.ABC):
    """One task type. Constructed without arguments in the task's own process; used once."""

    @abc.abstractmethod
    def run(self, ctx: Context) -> dict[str, Any]:
        """Run the task and return its result (JSON types; what is not finite becomes null).

        Raises:
            BadRequest: the task's own fault.
            RunnerError: anything else that can be said in one line.
            Cancelled: by way of `ctx.progress`, `ctx.sleep` and `ctx.check_cancelled`.
        """
