"""The node's settings: `conf/node.toml`, overridden by environment variables, overridden by flags; one frozen struct.

A setting that cannot be used is a ConfigError: where it came from, the key, what was found, what is allowed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

PositiveSeconds = Annotated[float, Meta(gt=0, le=366 * 86400)]
Bytes = Annotated[int, Meta(ge=0)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all sections of the file have in common."""


class NodeSettings(Section, frozen=True):
    """[node]"""

    worker_id: str | None = None
    """WORKER_ID. None: a random one, kept in state_dir so that it outlives a restart."""
    tags: tuple[str, ...] = ()
    """WORKER_TAGS"""
    cost_per_hour: Annotated[float, Meta(ge=0)] = 1.0
    """WORKER_COST_PER_HOUR, USD"""
    log_level: str = "INFO"
    """LOG_LEVEL"""
    log_file: str | None = None
    """JSON lines; rotated."""
    state_dir: str | None = None
    """Journal, sockets, spool. None: $STATE_DIRECTORY, /var/lib/flowmesh for root, else ~/.local/state/flowmesh."""
    elastic_scaling: bool = True
    """ENABLE_ELASTIC_SCALING"""


class RedisSettings(Section, frozen=True):
    """[redis]"""

    url: str | None = None
    """REDIS_URL"""
    task_topic: str = "tasks"
    """TASK_TOPIC"""
    heartbeat_interval_s: PositiveSeconds = 30.0
    """HEARTBEAT_INTERVAL_SEC"""
    timeout_s: PositiveSeconds = 5.0
    """Connecting, and each command's answer."""
    health_check_interval_s: PositiveSeconds = 15.0
    """How often a silent connection is asked whether it lives."""


class ResultsSettings(Section, frozen=True):
    """[results]"""

    dir: str = "./results_workers"
    """RESULTS_DIR"""
    allowed_roots: tuple[str, ...] = ()
    """Absolute folders besides `dir` that a task's output.destination.path may lie under."""


class TasksSettings(Section, frozen=True):
    """[tasks]"""

    cancel_grace_s: PositiveSeconds = 10.0
    """From the cancel frame to SIGTERM."""
    term_grace_s: PositiveSeconds = 5.0
    """From SIGTERM to SIGKILL of the whole tree."""
    default_timeout_s: PositiveSeconds | None = None
    """For tasks without timeoutSec. None: no limit."""
    pass_env: tuple[str, ...] = ()
    """Names (`*` allowed) that a task inherits from the node's environment, besides the built-in ones."""
    allow_env: tuple[str, ...] = ()
    """Names (`*` allowed) that a task's spec.env may set."""


class DeliverySettings(Section, frozen=True):
    """[delivery]"""

    orchestrator_url: str | None = None
    """ORCHESTRATOR_BASE_URL"""
    orchestrator_token: str | None = None
    """ORCHESTRATOR_TOKEN"""
    bandwidth_bytes_per_sec: Annotated[int, Meta(gt=0)] | None = None
    """WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC"""
    cleanup_after_upload: bool = False
    """MODEL_CLEANUP_AFTER_UPLOAD"""
    total_timeout_s: PositiveSeconds = 3600.0
    """All attempts of one task's delivery together."""
    concurrency: Annotated[int, Meta(ge=1, le=64)] = 2
    """Deliveries at once."""


class ArchiveSettings(Section, frozen=True):
    """[archive]"""

    use_pigz: bool = True
    """MODEL_ARCHIVE_USE_PIGZ"""
    compression_level: Annotated[int, Meta(ge=0, le=9)] = 6
    """MODEL_ARCHIVE_COMPRESSION_LEVEL"""
    pigz_threads: Annotated[int, Meta(ge=1)] | None = None
    """MODEL_ARCHIVE_PIGZ_THREADS; None: all CPUs"""
    pigz_bin: str = "pigz"
    """MODEL_ARCHIVE_PIGZ_BIN"""
    tar_bin: str = "tar"
    """MODEL_ARCHIVE_TAR_BIN"""


class ProcessesSettings(Section, frozen=True):
    """[processes]"""

    isolation: str = "auto"
    """auto | cgroup | subreaper"""
    adoption_timeout_s: PositiveSeconds = 60.0
    """How long fork servers keep tasks alive with no supervisor."""
    drain_timeout_s: PositiveSeconds = 3600.0
    """How long a drain waits for running tasks before it cancels them."""


class EnvironmentSettings(Section, frozen=True):
    """[environments.NAME]: a Python interpreter with its own packages"""

    python: str | None = None
    """None: the supervisor's own."""
    preload: tuple[str, ...] = ()
    """Modules that its fork server imports before the first task."""


class TaskTypeSettings(Section, frozen=True):
    """[task_types.NAME]: a task type of your own, or another environment for a built-in one"""

    runner: str | None = None
    """module:Class. None: the built-in one of that name."""
    environment: str | None = None


class Settings(Section, frozen=True):
    """Everything that can be set."""

    node: NodeSettings = NodeSettings()
    redis: RedisSettings = RedisSettings()
    results: ResultsSettings = ResultsSettings()
    tasks: TasksSettings = TasksSettings()
    delivery: DeliverySettings = DeliverySettings()
    archive: ArchiveSettings = ArchiveSettings()
    processes: ProcessesSettings = ProcessesSettings()
    environments: dict[str, EnvironmentSettings] = {}
    task_types: dict[str, TaskTypeSettings] = {}
