"""What the node hands to a task's child, and what the child leaves behind for the node.

Both travel as files in the attempt's spool folder, so neither is lost with a process that dies: `job.json`
is written before the child exists, `outcome.json` (atomically) before the child says that it is done.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

JOB_FILE = "job.json"
OUTCOME_FILE = "outcome.json"
MAX_OUTCOME_BYTES = 4 * 1024**3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one task, as its child sees it."""

    attempt: int
    task_id: str
    task_type: str
    runner: str
    """`module:Class` of the runner."""
    task: dict[str, Any]
    """The submitted document: `spec`, `metadata`, and where the task was merged, `merge_children`."""
    out_dir: str
    """The task's folder, `RESULTS_DIR/<task_id>` or where `output.destination.path` put it."""
    results_dir: str
    """RESULTS_DIR: where the folders of other tasks of this node lie."""
    cache_dir: str
    """Downloads shared by tasks."""
    tmp_dir: str
    """This attempt's own TMPDIR; gone when the attempt is over."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that this task may use; empty: none."""
    threads: int = 1
    """CPU threads that this task should compute with."""
    delivers_http: bool = False
    """Whether results go over HTTP; a training runner then asks for its archive."""
    file_url: str | None = None
    """The URL under which a delivered file will be found, with `{name}` for its name; None without HTTP."""
    child_dirs: dict[str, str] = {}
    """The folder of each merged child, by its id."""
    limits: dict[str, Any] = {}
    """Node settings that runners obey, by name (see `[runners]` in conf/node.toml)."""


class Fault(enum.StrEnum):
    """Who an unsuccessful run is down to. Anything a runner raises without saying is `ERROR`."""

    ERROR = "error"
    CRASH = "crash"
    """A process that the task had started for its work died without a word."""
    BAD_REQUEST = "bad_request"
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    CANCELLED = "cancelled"


class ArchiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A top-level folder of the task's folder that delivery packs and uploads; its fields go into the result."""

    folder: str
    """`final_model` or `final_lora`: the result gets `<folder>_archive`, `_archive_path`, `_archive_url`, …"""


class UploadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A file that delivery uploads under HTTP delivery."""

    path: str
    """Relative to the task's folder (for a merged child: to the child's folder)."""
    field: str
    """The mapping in the result that gets `uploaded`, `url` and `download_url`, for example `jsonl_export`."""
    child: str | None = None
    """The merged child that it belongs to, or None for the task itself."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, by the child's own word."""

    attempt: int
    ok: bool
    result: dict[str, Any] | None = None
    fault: Fault | None = None
    message: str = ""
    """One line, for `TASK_FAILED`."""
    detail: str = ""
    """The traceback or whatever else helps; goes to responses.json of a failed task."""
    archives: tuple[ArchiveRequest, ...] = ()
    uploads: tuple[UploadRequest, ...] = ()
    phases: dict[str, float] = {}
    """Seconds in each phase, in the order they were entered."""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel and the fork server saw of a task's end."""

    code: int | None = None
    """The exit status, where it exited."""
    signal: int | None = None
    """The signal, where one killed it."""
    oom_kills: int = 0
    """Processes of this task that the kernel killed for memory, by its own count."""
    swept: int = 0
    """Processes that were still there when the first one had ended."""
    left: int = 0
    """Processes that could not be killed. Not zero only for processes stuck in the kernel."""
    ran_s: float = 0.0
    """From its fork to its end, whoever looked; 0 where the fork server is too old to say."""
    user_cpu_s: float = 0.0
    system_cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    gone_ms: float = 0.0
    """From the first process's end to an empty tree."""
