"""The job that the node gives to a task's child, and the outcome that the child leaves for the node.

Both are files in the attempt's spool folder, so that neither is lost if a process dies: the node writes `job.json`
before the child is forked; the child writes `outcome.json` (atomically) before it reports that it has finished.
"""

from __future__ import annotations

import enum
import signal
from typing import Any

import msgspec

from flowmesh.messages.gateway import Gateway
from flowmesh.messages.nodes import Gang
from flowmesh.messages.rows import Counts
from flowmesh.messages.serving import Served

EXIT_SETUP = 70
"""Of a task's process: it could not be set up, or its entry raised. An error of the node (EX_SOFTWARE)."""
JOB_FILE = "job.json"
OUTCOME_FILE = "outcome.json"
MAX_OUTCOME_BYTES = 4 * 1024**3


class Permits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows documents to do. The defaults allow the least; docs/tasks.md says what each opens."""

    own_user: bool = False
    """Whether tasks run as a user of their own, whose permissions then bound what they read."""
    read_roots: tuple[str, ...] = ()
    """Absolute folders (`*` for one part of a path) that documents may name files in."""
    hidden: tuple[str, ...] = ()
    """Folders that no document may name, such as the node's state folder, except roots inside them."""
    caches: tuple[str, ...] = ()
    """Folders in which the libraries of the model hub keep models and datasets."""
    trust_remote_code: tuple[str, ...] = ()
    """Sources (`*` allowed) whose own code may run: hub ids, and absolute folders."""
    vllm_arguments: tuple[str, ...] = ()
    """Engine arguments of vLLM beyond the harmless ones (`*` allowed)."""
    reasoning_parsers: tuple[str, ...] = ()
    """Reasoning parsers of vLLM (`*` allowed) that documents may name."""
    commands: tuple[str, ...] = ()
    """Patterns (`*` allowed) of the programs that tasks may run."""
    serve: tuple[str, ...] = ()
    """Addresses that tasks of the type serve may listen on; `*`: any."""
    trainer_arguments: tuple[str, ...] = ()
    """Arguments of trainers beyond the harmless ones (`*` allowed)."""
    local_hosts: tuple[str, ...] = ()
    """`HOST` or `HOST:PORT` (`*` allowed) that downloads may reach on loopback and link-local addresses."""
    orchestrator_url: str | None = None
    """The orchestrator's address, which may be a local one."""
    api_keys: tuple[str, ...] = ()
    """`VARIABLE@HOST` or `VARIABLE@HOST:PORT` (`*` allowed): which keys tasks of the type api may send where."""
    s3_read: tuple[str, ...] = ()
    """`s3://BUCKET/PREFIX` (`*` allowed) that documents may read; the gateway enforces it."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one task, as its child sees it."""

    attempt: int
    task_id: str
    task_type: str
    runner: str
    """`module:Class` of the runner."""
    extra: str = ""
    """The extra of flowmesh-supervisor that installs what the task type needs; empty: it has none."""
    task: dict[str, Any]
    """The submitted document: `spec`, `metadata`, and for a merged task `merge_children`."""
    out_dir: str
    """The task's folder: `RESULTS_DIR/<task_id>`, or as `output.destination.path` asks."""
    results_dir: str
    """RESULTS_DIR, which contains the folders of this node's other tasks."""
    cache_dir: str
    """A folder for downloads, shared by all tasks."""
    tmp_dir: str
    """This attempt's TMPDIR; removed when the attempt has ended."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that this task may use."""
    threads: int = 1
    """CPU threads that this task should use."""
    delivers_http: bool = False
    """Whether results are sent over HTTP; a training runner then requests an archive."""
    file_url: str | None = None
    """The URL of a delivered file, with `{name}` for its name; None without HTTP delivery."""
    child_dirs: dict[str, str] = {}
    """The folder of each merged child, by its id."""
    limits: dict[str, Any] = {}
    """Node settings for runners, by name (see `[runners]` in conf/node.toml)."""
    permits: Permits = Permits()
    gateway: Gateway | None = None
    """What fetches from the orchestrator with the node's token; None: the node has none."""
    gang: Gang | None = None
    """None: the task runs on one node."""
    served: Served | None = None
    """Where the task serves its model that the document names; None: it names none."""


class Fault(enum.StrEnum):
    """The cause of an unsuccessful run. An exception without one is `ERROR`."""

    ERROR = "error"
    CRASH = "crash"
    """A process that the task had started died without reporting an error."""
    BAD_REQUEST = "bad_request"
    MISSING_DEPENDENCY = "missing_dependency"
    """A library that the task needs is not installed here."""
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    CANCELLED = "cancelled"


class CommandExit(msgspec.Struct, frozen=True, kw_only=True):
    """How the program of a `command` or `python` task ended."""

    code: int | None = None
    """Its exit status; None: it was killed."""
    signal: str | None = None
    """The signal that killed it, such as SIGKILL; None: it exited."""

    @classmethod
    def of(cls, status: int) -> CommandExit:
        """Of an exit status, or minus a signal's number."""
        if status >= 0:
            return cls(code=status)
        try:
            return cls(signal=signal.Signals(-status).name)
        except ValueError:
            return cls(signal=f"signal {-status}")


class ArchiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A top-level folder of the task's folder that the delivery archives and uploads; its fields enter the result."""

    folder: str
    """`final_model` or `final_lora`: the result gets `<folder>_archive`, `_archive_path`, `_archive_url`, …"""


class UploadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an HTTP delivery uploads."""

    path: str
    """Relative to the task's folder (for a merged child: to the child's folder)."""
    field: str
    """The mapping in the result that gets `uploaded`, `url` and `download_url`, such as `jsonl_export`."""
    child: str | None = None
    """The id of the merged child that it belongs to; None: the task itself."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, as the child reports it."""

    attempt: int
    ok: bool
    result: dict[str, Any] | None = None
    fault: Fault | None = None
    message: str = ""
    """One line, for `TASK_FAILED`."""
    detail: str = ""
    """The traceback or other details, for responses.json of a failed task."""
    archives: tuple[ArchiveRequest, ...] = ()
    uploads: tuple[UploadRequest, ...] = ()
    phases: dict[str, float] = {}
    """Seconds in each phase, in order."""
    rows: Counts | None = None
    """Of a task that keeps a row log, its merged children included."""
    spent_usd: float = 0.0
    """What its requests to an endpoint have cost, by the prices in the document."""
    command: CommandExit | None = None
    """Of a task that runs a program, once the program has ended."""
    warnings: tuple[str, ...] = ()
    """As in the result, for the terminal event; also those of a run that failed."""
    versions: dict[str, str] = {}
    """Of the libraries that the process had imported, for the history."""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a task's processes ended, as the kernel and the fork server observed it."""

    code: int | None = None
    """The exit status; None: it was killed."""
    signal: int | None = None
    """The signal that killed it; None: it exited."""
    oom_kills: int = 0
    """Processes of this task that the kernel's OOM killer has killed, by the kernel's count."""
    swept: int = 0
    """Processes that still ran when the first one had ended, and were killed."""
    left: int = 0
    """Processes that could not be killed, because they are stuck in the kernel."""
    ran_s: float = 0.0
    """Seconds from its fork to its end; 0: the fork server is of a version that does not report it."""
    user_cpu_s: float = 0.0
    system_cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    gone_ms: float = 0.0
    """Milliseconds from the end of the first process to the end of the last one."""
