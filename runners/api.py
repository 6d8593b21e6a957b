"""The interface of runners, built-in ones and those of other packages: their base class, context and errors.

A runner is a class with one method, `run(ctx) -> dict`; the dict is the task's result. It runs in a new process, on
the main thread, with stdout and stderr redirected to the task's logs.
"""

from __future__ import annotations

import abc
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from flowmesh import installed
from flowmesh.messages.job import ArchiveRequest, CommandExit, Fault, Job, UploadRequest
from flowmesh.messages.rows import Counts
from flowmesh.processes.pipe import Cancel, FrameError, Phase, Pipe, Progress, Serving
from flowmesh.validation.convert import FieldError, convert
from runners.data.reading import Reach

PROGRESS_INTERVAL_S = 0.1
"""Shortest interval between two progress frames; those between are dropped, to keep the pipe free."""

T = TypeVar("T")
Preparation = Callable[[], "Iterable[Path]"]
"""Of what a runner does ahead; see `Runner.ahead`."""


class RunnerError(Exception):
    """A run failed, and the task's author cannot fix it. The message is the task's one-line error."""

    fault = Fault.ERROR
    says_all = False
    """Whether the message is all there is to say, so that a traceback of ours would only hide it."""


class BadRequest(RunnerError):
    """The task asks for something that is not possible. The message names the field and the remedy.

    Args:
        faults: one message for each field, where `message` is about several.
    """

    fault = Fault.BAD_REQUEST

    def __init__(self, message: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults or (message,)


class MissingDependency(RunnerError):
    """A library that the task needs is not installed in its environment. Another worker may have it.

    Args:
        library: its name as it is imported.
        where: the document's field that needs it.
        extra: the extra of flowmesh-supervisor that installs it; None: as EXTRAS has it.
    """

    fault = Fault.MISSING_DEPENDENCY
    own_extra = ""
    """The extra of this process's task type."""

    def __init__(self, library: str, where: str = "", *, extra: str | None = None) -> None:
        name = library.partition(".")[0]
        if extra is None:
            extra = self.own_extra or "inference" if name in IN_EVERY_EXTRA else EXTRAS.get(name, "")
        needed = f" ({where})" if where else ""
        remedy = installed.install_command(extra) if extra else f"{sys.executable} -m pip install {name}"
        super().__init__(f"{library}{needed} is not installed in this environment: {remedy}")

    @classmethod
    def of(cls, error: ImportError, where: str = "") -> RunnerError:
        """What an import error means for the task. Libraries raise some without the name of a module."""
        if error.name:
            return cls(error.name, where)
        made = RunnerError(f"{where}: {' '.join(str(error).split()):.500}" if where else " ".join(str(error).split()))
        made.fault = cls.fault
        return made


IN_EVERY_EXTRA = frozenset(
    ("torch", "numpy", "transformers", "tokenizers", "accelerate", "peft", "datasets", "pyarrow")
)
"""Libraries that each of the extras inference, training, vllm and rag installs: the task type's own is named."""
EXTRAS = {
    "vllm": "vllm",
    "PIL": "inference",
    "trl": "training",
    "bitsandbytes": "quantization",
    "deepspeed": "deepspeed",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "faiss": "rag",
    "sentence_transformers": "rag",
    "qdrant_client": "rag",
    "pypdf": "rag",
    "fastapi": "serve",
    "uvicorn": "serve",
    "mammoth": "rag",
    "markdownify": "rag",
    "bs4": "rag",
    "smolagents": "agent",
    "openai": "agent",
    "mcp": "agent",
    "httpx2": "agent",
}
"""The extras that install other libraries, by the name that is imported."""


class Later(RunnerError):
    """Raised while a task is prepared ahead, in place of what only the task itself may do.

    Args:
        path: a file that it will read then.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class Cancelled(BaseException):
    """The node asked this task to stop. Not an Exception, so that a runner's `except Exception` does not catch it.

    Args:
        reason: for the task's error.
        checkpoint: the runner should save a checkpoint first.
    """

    def __init__(self, reason: str = "cancelled", *, checkpoint: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.checkpoint = checkpoint


class TaskInput:
    """A task's document, folders and resources, and the deliveries that the runner asks for.

    Args:
        job: as the node wrote it to the task's spool.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        MissingDependency.own_extra = job.extra
        self.task_id = job.task_id
        self.spec: dict[str, Any] = job.task.get("spec") or {}
        self.merge_children: list[dict[str, Any]] = job.task.get("merge_children") or []
        self.gpus = job.gpus
        self.threads = job.threads
        self.log = logging.getLogger(f"flowmesh.task.{job.task_type}")
        self.archives: list[ArchiveRequest] = []
        self.uploads: list[UploadRequest] = []
        self.warnings: list[str] = []
        """What was logged as a warning: `warnings` of the result."""
        self.unused: list[str] = []
        """Paths of the document's fields that are accepted without effect."""
        self.unpacks = True
        """Whether archives of this node are unpacked; False while the task is only prepared: each attempt does it."""
        self.downloads = True
        """Whether anything is downloaded; False where the task may yet be another node's."""
        self._reported_unused = ""

    @functools.cached_property
    def out_dir(self) -> Path:
        return Path(self.job.out_dir)

    @functools.cached_property
    def artifacts_dir(self) -> Path:
        return self.out_dir / "artifacts"

    @functools.cached_property
    def results_dir(self) -> Path:
        return Path(self.job.results_dir)

    @functools.cached_property
    def cache_dir(self) -> Path:
        return Path(self.job.cache_dir)

    @functools.cached_property
    def tmp_dir(self) -> Path:
        return Path(self.job.tmp_dir)

    @functools.cached_property
    def reach(self) -> Reach:
        """What the document may read. Runners open its paths by it; see `runners.models.sources.local_path`."""
        return Reach.of(self.job)

    def section(self, name: str, into: type[T]) -> T:
        """`spec.<name>` as a struct; `{}` is converted if the task does not have it.

        Raises:
            BadRequest: names the field, the value found, and the values allowed.
        """
        return self.check(self.spec.get(name) or {}, into, f"spec.{name}")

    def check(self, value: Any, into: type[T], where: str, *, strict: bool = True) -> T:
        """`value` as a struct of type `into`; `where` is its dotted path in the task.

        Fields that are accepted without effect are noted in `unused`.

        Args:
            strict: False also takes "3" for 3 and "true" for True.

        Raises:
            BadRequest: names each field, the value found, and the values allowed.
        """
        try:
            return convert(value, into, where=where, strict=strict, unused=self.unused)
        except FieldError as error:
            raise BadRequest(str(error), error.faults) from None

    def report_unused(self) -> None:
        """Log one warning that names all fields in `unused`. It replaces the one of an earlier call."""
        text = f"fields not used: {', '.join(dict.fromkeys(self.unused))}"
        if self.unused and text != self._reported_unused:
            if self._reported_unused in self.warnings:
                self.warnings.remove(self._reported_unused)
            self._reported_unused = text
            self.log.warning(text)

    def archive(self, folder: str) -> None:
        """Under HTTP delivery, have the top-level `folder` of out_dir packed and uploaded; else do nothing."""
        if self.job.delivers_http:
            self.archives.append(ArchiveRequest(folder=folder))

    def upload(self, path: str, field: str, child: str | None = None) -> None:
        """Under HTTP delivery, have a file of out_dir uploaded and its url set as `result[field]`; else do nothing."""
        if self.job.delivers_http:
            self.uploads.append(UploadRequest(path=path, field=field, child=child))


class Context(TaskInput):
    """A runner's view of its task and its node: what the task asks for, and progress and cancellation.

    Args:
        pipe: to the node; None where there is none, as in a test.
    """

    def __init__(self, job: Job, pipe: Pipe | None = None) -> None:
        super().__init__(job)
        self.phases: dict[str, float] = {}
        """Seconds in each phase that has ended."""
        self.rows: Counts | None = None
        """Rows that stand, of a runner that keeps a row log."""
        self.spent_usd = 0.0
        """What requests to an endpoint have cost, of a runner that pays for some."""
        self.command: CommandExit | None = None
        """How the task's program ended, of a runner that runs one."""
        self._pipe = pipe
        self._cancel: Cancel | None = None
        self._phase: tuple[str, float] | None = None
        self._last_progress = 0.0

    @property
    def pipe(self) -> Pipe | None:
        """The pipe to the node, for a runner whose ranks report over it; None where there is no node."""
        return self._pipe

    def phase(self, name: str) -> None:
        """Enter a phase (`load`, `generate`, `train`, `save` …). The task's event has the seconds of each."""
        self.finish()
        self._phase = (name, time.monotonic())
        if self._pipe is not None:
            self._pipe.send(Phase(name), drop=True)

    def progress(self, done: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        """Report progress, and check for cancellation. Cheap enough for an inner loop.

        Args:
            done: how much is done, in `unit`s.
            total: None if unknown.
            metrics: such as loss=0.3; shown beside the progress.

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

    def serve(
        self,
        base_url: str,
        model: str,
        api_key: str,
        *,
        numbers: dict[str, float] | None = None,
        times: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        """Tell the node where this task serves a model. Send it again every few seconds: a new node needs it, too.

        Args:
            model: the name that requests give it.
            api_key: what clients send. The node gives it to those who may read the deployment's Redis.
            numbers, times: what it has counted, for the node's metrics; see `flowmesh.messages.serving`.
        """
        if self._pipe is not None:
            self._pipe.send(Serving(base_url, model, api_key, True, numbers or {}, times or {}), drop=True)

    @property
    def cancelled(self) -> Cancel | None:
        """The node's request to stop, or None. One system call, cheap enough to poll often."""
        if self._cancel is None and self._pipe is not None:
            try:
                frame = self._pipe.poll()
            except (EOFError, FrameError):
                frame = None
            if isinstance(frame, Cancel):
                self._cancel = frame
        return self._cancel

    def check_cancelled(self) -> None:
        """Raise Cancelled if the node asked the task to stop."""
        request = self.cancelled
        if request is not None:
            raise Cancelled(request.reason, checkpoint=request.checkpoint)

    def sleep(self, seconds: float) -> None:
        """Sleep; a cancellation wakes it at once.

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

    def finish(self) -> None:
        """End the current phase. The child calls this when the runner has returned or raised."""
        if self._phase is not None:
            name, since = self._phase
            self.phases[name] = round(self.phases.get(name, 0.0) + time.monotonic() - since, 6)
            self._phase = None


class Runner(abc.ABC):
    """One task type. Constructed without arguments in the task's process, and used once."""

    def ahead(self, ctx: Context) -> Iterable[Preparation]:  # noqa: ARG002 - the default reads nothing
        """What can be done before the task has its slot: each part downloads what it needs into the node's cache, and
        names the files and folders that the task will read, which are then read into the kernel's cache.

        Called in a process of its own, while another task runs: it must touch no device, write to nothing but caches,
        and bear to be killed at any moment. What a part raises is dropped: the task meets it itself.
        """
        return ()

    @abc.abstractmethod
    def run(self, ctx: Context) -> dict[str, Any]:
        """Run the task and return its result in JSON types; NaN and infinity become null.

        Raises:
            BadRequest: the task itself is wrong.
            RunnerError: any other failure with a one-line explanation.
            Cancelled: raised by `ctx.progress`, `ctx.sleep` and `ctx.check_cancelled`.
        """
