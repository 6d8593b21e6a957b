"""The node's settings as one frozen struct: the sections of `conf/node.toml`, and what each key means.

The repr of a section hides secrets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from flowmesh.redaction import HIDDEN, redact_url
from flowmesh.settings.types import (
    AbsolutePath,
    Bucket,
    CpuList,
    FilePath,
    GpuName,
    HostName,
    Isolation,
    KeyPlace,
    LogLevel,
    ModuleName,
    Moment,
    Name,
    PortRange,
    PositiveSeconds,
    RunnerName,
    ServeAddress,
    SlotName,
    SlotsMode,
    Token,
    Umask,
    VariableName,
    Warm,
    Word,
)

_REDACTED: dict[str, Callable[[str], str]] = {
    "url": redact_url,
    "orchestrator_url": redact_url,
    "orchestrator_token": lambda _: HIDDEN,
    "endpoint_url": redact_url,
    "endpoint": redact_url,
    "access_key_id": lambda _: HIDDEN,
    "secret_access_key": lambda _: HIDDEN,
    "session_token": lambda _: HIDDEN,
}
"""How each field that is a secret, or contains one, is shown."""


def shown_receiver(url: str) -> str:
    """The address of a webhook for display: only its scheme and host, as the rest is often the secret."""
    scheme, separator, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not separator or re.fullmatch(r"[\w.:\[\]-]+", authority.rpartition("@")[2]) is None:
        return HIDDEN
    return f"{scheme}://{authority.rpartition('@')[2]}"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file. Unknown keys are refused."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        pairs = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [(name, _REDACTED[name](it) if name in _REDACTED and isinstance(it, str) else it) for name, it in pairs]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class NodeSettings(Section, frozen=True):
    """[node]"""

    worker_id: Name | None = None
    """WORKER_ID. None: a random one, kept in state_dir across restarts."""
    tags: tuple[Word, ...] = ()
    """WORKER_TAGS"""
    cost_per_hour: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """WORKER_COST_PER_HOUR, USD"""
    log_level: LogLevel = LogLevel.INFO
    """LOG_LEVEL, in any case"""
    log_file: FilePath | None = None
    """The node's log as JSON lines, rotated. None: stderr only."""
    state_dir: FilePath | None = None
    """Journal, sockets, spool. None: see `settings_paths.state_dir()`."""
    history_days: Annotated[float, Meta(gt=0, le=36500)] = 90.0
    """How long the journal keeps what became of a task, and its document with secrets hidden."""
    history_max: Annotated[int, Meta(ge=0, le=10_000_000)] = 10_000
    """How many tasks it keeps there at most."""
    history_bytes: Annotated[int, Meta(ge=2**20, le=2**40)] = 256 * 1024**2
    """How large the journal may become before the oldest are deleted. One takes about 1 KiB; at most 130 KiB."""
    elastic_scaling: bool = True
    """ENABLE_ELASTIC_SCALING"""
    slots: SlotsMode = SlotsMode.ALL
    """How GPUs and CPUs are divided into slots; `[[slots]]` lists slots one by one instead."""
    ends_at: float | Moment | None = None
    """When this node must have ended. None: SLURM_JOB_END_TIME; where there is none either, it has no end."""
    ends_margin_s: PositiveSeconds = 120.0
    """So long before, it takes no more tasks, and running ones save a checkpoint and go back."""
    exit_when_idle_s: PositiveSeconds | None = None
    """A node that had no task for so long, and finds none in the queue, exits with 0. None: it stays."""
    on_sigterm: Literal["finish", "checkpoint"] | None = None
    """How a signal drains. None: `checkpoint` where the node's end is known, else `finish`."""


class RedisSettings(Section, frozen=True):
    """[redis]"""

    url: str | None = None
    """REDIS_URL; the scheme in upper or lower case"""
    password_file: FilePath | None = None
    """REDIS_PASSWORD_FILE: a file with the password, read at each connection."""
    task_topic: Word = "tasks"
    """TASK_TOPIC"""
    heartbeat_interval_s: PositiveSeconds = 30.0
    """HEARTBEAT_INTERVAL_SEC"""
    timeout_s: PositiveSeconds = 5.0
    """Limit for connecting, and for the answer to each command."""
    health_check_interval_s: PositiveSeconds = 15.0
    """An idle connection is checked with PING this often."""
    hold_events_s: Annotated[float, Meta(ge=0, le=86400)] = 600.0
    """How long tasks' events wait while nobody listens to them. 0: they do not wait."""
    stream: bool = False
    """Whether each worker also takes tasks from the Redis Stream `tasks:WORKER_ID`."""


class QueueSettings(Section, frozen=True):
    """[queue]"""

    enabled: bool = True
    """Whether idle slots take tasks from the deployment's queue."""
    result_ttl_s: Annotated[int, Meta(ge=0, le=366 * 86400)] = 86400
    """How long results of queued and submitted tasks lie in Redis. 0: they are not put there."""
    take_over_after_s: PositiveSeconds = 60.0
    """How long a worker's heartbeat key must have been gone before its tasks go back to the queue."""
    preempt: bool = True
    """Whether a queued training task of low priority makes room for one of high priority."""
    pipelines: Annotated[int, Meta(ge=0, le=256)] = 4
    """How many submitted pipelines this node drives at once. 0: none."""
    gang_address: HostName | None = None
    """Where the other members of a task on several nodes reach this node. None: from where it reaches Redis."""
    gang_ports: PortRange | None = None
    """The ports at which they meet. None: any that is free."""


class ResultsSettings(Section, frozen=True):
    """[results]"""

    dir: FilePath = "./results_workers"
    """RESULTS_DIR"""
    umask: Umask = "0027"
    """Rights that nobody gets to the node's files and those of its tasks: octal, as for umask(1)."""
    allowed_roots: tuple[AbsolutePath, ...] = ()
    """Absolute folders besides `dir` that a task's output.destination.path may lie under."""
    refuse_outside_paths: bool = False
    """Whether a task whose path lies elsewhere is refused. False: its result goes to `dir`, with a warning."""
    min_free_bytes: Annotated[int, Meta(ge=0, le=2**62)] = 1024**3
    """Free space that `dir`, the state folder and a task's own folder need before a task is started. 0: no check."""
    wait_for_room_s: PositiveSeconds = 60.0
    """How long tasks wait for free space before they are returned to the orchestrator."""
    keep_days: Annotated[float, Meta(gt=0, le=36500)] | None = None
    """Results of finished tasks are removed after this many days. None: never."""
    keep_bytes: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    """The oldest results are removed while all results together take more. None: never."""


class TasksSettings(Section, frozen=True):
    """[tasks]"""

    cancel_grace_s: PositiveSeconds = 10.0
    """Time from the cancel frame to SIGTERM."""
    term_grace_s: PositiveSeconds = 5.0
    """Time from SIGTERM to SIGKILL of the whole process tree."""
    default_timeout_s: PositiveSeconds | None = None
    """For tasks without timeoutSec. None: no limit."""
    pass_env: tuple[VariableName, ...] = ()
    """Names (`*` allowed) that a task inherits from the node's environment, besides the built-in ones."""
    allow_env: tuple[VariableName, ...] = ()
    """Names (`*` allowed) that a task's spec.env may set."""
    hang_timeout_s: PositiveSeconds | None = None
    """A task that reports no phase or progress for this long has its stacks dumped and is stopped. None: never."""
    node_fault_wait_s: PositiveSeconds = 300.0
    """How long a task waits while the node has a fault that keeps it from being started."""
    return_waiting_after_s: PositiveSeconds = 120.0
    """A task that waits behind a running one for so long goes back, as retryable, once another worker is idle."""
    prepare_next: bool = True
    """Whether downloads and files of the task that a slot gets next are read while another one runs there."""
    served_model_wait_s: PositiveSeconds = 300.0
    """How long a task waits for the task whose served model its document names."""
    log_max_bytes: Annotated[int, Meta(ge=65536)] = 64 * 1024 * 1024
    """Limit for each log file of a task; only the end of a larger one is kept."""
    max_queued: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    """Tasks that wait for one worker. A further dispatch is answered with a retryable TASK_FAILED."""
    read_roots: tuple[AbsolutePath, ...] = ()
    """Folders (`*` for one part) whose files documents may name, besides results and caches."""
    trust_remote_code: tuple[Word, ...] = ()
    """Hub ids and absolute folders (`*` allowed) of models whose own code may run."""
    vllm_arguments: tuple[VariableName, ...] = ()
    """Engine arguments of vLLM (`*` allowed) that documents may set although they load code or open files."""
    reasoning_parsers: tuple[VariableName, ...] = ("*",)
    """Reasoning parsers of vLLM (`*` allowed) that documents may name."""
    trainer_arguments: tuple[VariableName, ...] = ()
    """Arguments of trainers (`*` allowed) that documents may set although they load code or send data out."""
    allow_command: tuple[Word, ...] = ()
    """Programs (`*` allowed) that tasks of the types `command` and `python` may run. Empty: the types are off."""
    allow_serve: tuple[ServeAddress, ...] = ()
    """IP addresses (`*`: any) that tasks of the type `serve` may listen on. Empty: the type is off."""
    local_hosts: tuple[Word, ...] = ()
    """HOST or HOST:PORT (`*` allowed) that downloads may reach on loopback and link-local addresses."""
    api_keys: tuple[KeyPlace, ...] = ()
    """VARIABLE@HOST or VARIABLE@HOST:PORT (`*` allowed): keys that tasks of the type `api` may send to these hosts."""


class DeliverySettings(Section, frozen=True):
    """[delivery]"""

    orchestrator_url: str | None = None
    """ORCHESTRATOR_BASE_URL"""
    orchestrator_token: Token | None = None
    """ORCHESTRATOR_TOKEN"""
    orchestrator_token_file: FilePath | None = None
    """ORCHESTRATOR_TOKEN_FILE: a file with the token, read at each use."""
    bandwidth_bytes_per_sec: Annotated[int, Meta(ge=1, le=2**62)] | None = None
    """WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC"""
    cleanup_after_upload: bool = False
    """MODEL_CLEANUP_AFTER_UPLOAD"""
    total_timeout_s: PositiveSeconds = 3600.0
    """Limit for all attempts of one task's delivery together."""
    concurrency: Annotated[int, Meta(ge=1, le=64)] = 2
    """Deliveries at once."""


class CloudSettings(Section, frozen=True):
    """[cloud]"""

    read: tuple[Bucket, ...] = ()
    """s3://BUCKET or s3://BUCKET/PREFIX (`*` allowed) that documents may read with the node's credentials."""
    write: tuple[Bucket, ...] = ()
    """The same of where documents may have results sent."""
    endpoint_url: str | None = None
    """AWS_ENDPOINT_URL_S3. None: that of AWS in the region."""
    region: Name | None = None
    """AWS_REGION"""
    credentials_file: FilePath | None = None
    """AWS_SHARED_CREDENTIALS_FILE: a file in the format of ~/.aws/credentials, read at each use."""
    profile: Word = "default"
    """AWS_PROFILE: the section of that file."""
    access_key_id: Token | None = None
    """AWS_ACCESS_KEY_ID"""
    secret_access_key: Token | None = None
    """AWS_SECRET_ACCESS_KEY"""
    session_token: Token | None = None
    """AWS_SESSION_TOKEN"""
    role: bool = False
    """Whether to use the credentials of the machine's or the container's role."""


class ArchiveSettings(Section, frozen=True):
    """[archive]"""

    use_pigz: bool = True
    """MODEL_ARCHIVE_USE_PIGZ"""
    compression_level: Annotated[int, Meta(ge=0, le=9)] = 6
    """MODEL_ARCHIVE_COMPRESSION_LEVEL"""
    pigz_threads: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """MODEL_ARCHIVE_PIGZ_THREADS; None: all CPUs"""
    pigz_bin: FilePath = "pigz"
    """MODEL_ARCHIVE_PIGZ_BIN"""
    tar_bin: FilePath = "tar"
    """MODEL_ARCHIVE_TAR_BIN"""


class ProcessesSettings(Section, frozen=True):
    """[processes]"""

    isolation: Isolation = Isolation.AUTO
    adoption_timeout_s: PositiveSeconds = 60.0
    """How long fork servers keep tasks alive with no supervisor."""
    drain_timeout_s: PositiveSeconds = 3600.0
    """How long a drain waits for running tasks before it cancels them."""
    private_shm: bool = True
    """Tasks of heavy environments get a private /dev/shm, where the system allows it."""
    task_user: Word | None = None
    """User that tasks run as; the node must be root. None: the node's own user."""
    task_nice: Annotated[int, Meta(ge=0, le=19)] = 0
    task_memory_max_bytes: Annotated[int, Meta(ge=16 * 1024 * 1024)] | None = None
    """memory.max of each task's cgroup."""
    task_pids_max: Annotated[int, Meta(ge=8)] | None = None
    """pids.max of each task's cgroup."""
    warm_max_mb: Annotated[int, Meta(ge=0)] | None = None
    """Memory of fork servers that no task has asked for. None: a quarter of the node's memory; 0: none is started."""


class GpuSettings(Section, frozen=True):
    """[gpu]"""

    allow_foreign: bool = False
    """Whether tasks start on a GPU that a foreign process uses."""
    release_timeout_s: PositiveSeconds = 30.0
    """How long a task's GPUs may take to be released before their slot is quarantined."""
    release_tolerance_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 64 * 1024 * 1024
    """Memory that a GPU may have in use above its level before the task, and still count as released."""
    sample_interval_s: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    """Interval between two samples of the GPUs of running tasks."""
    probe_interval_s: PositiveSeconds = 60.0
    """The longest pause between two probes of a quarantined slot; the first is one second."""
    canary: RunnerName = "runners.canary:check_gpu"
    """Check that must pass in a child process on a GPU that had a fault, before tasks run there again."""


class SlotSettings(Section, frozen=True):
    """[[slots]]: GPUs and CPUs for one task at a time"""

    name: SlotName
    gpus: tuple[GpuName, ...] = ()
    cpus: CpuList | None = None
    """CPUs that its tasks are confined to. None: those that no slot names, shared by all slots without `cpus`."""


class MetricsSettings(Section, frozen=True):
    """[metrics]"""

    textfile: FilePath | None = None
    """File that gets the metrics, for node_exporter's textfile collector. None: none."""
    interval_s: Annotated[float, Meta(ge=1, le=3600)] = 15.0
    """Interval between two writes."""
    job_mapping_dir: FilePath | None = None
    """Folder with a file for each GPU that names its task, for dcgm-exporter. None: none."""


NotifyEvent = Literal["failed", "succeeded", "slot_closed", "slot_opened", "node_down", "node_up"]


class NotifySettings(Section, frozen=True):
    """[notify]: webhooks"""

    url: tuple[Word, ...] = ()
    """Where notifications are sent: one address, or several."""
    secret_file: FilePath | None = None
    """File with the secret that signs them, read at each attempt. None: they are not signed."""
    events: tuple[NotifyEvent, ...] = ("failed", "slot_closed", "slot_opened", "node_down", "node_up")
    """What is told."""
    format: Literal["json", "slack"] = "json"
    """`slack`: {"text": …} only, in Slack's markup."""
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 10.0
    """Limit for connecting, and for the answer."""
    keep_s: PositiveSeconds = 86400.0
    """How long a notification is tried."""
    node_down_after_s: Annotated[float, Meta(ge=1, le=86400)] = 60.0
    """How long another node's heartbeats must be missing before it counts as down."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = tuple(shown_receiver(url) for url in self.url)
        return [(name, shown if name == "url" else it) for name, it in super().__rich_repr__()]


class OtelSettings(Section, frozen=True):
    """[otel]: a span for each task, over OTLP/HTTP; OpenTelemetry's own variables count, too"""

    endpoint: str | None = None
    """The collector. None: OTEL_EXPORTER_OTLP_ENDPOINT; where there is none either, no spans are sent."""
    headers_file: FilePath | None = None
    """File with headers of the requests, one `Name: value` a line. None: OTEL_EXPORTER_OTLP_HEADERS."""


class WebSettings(Section, frozen=True):
    """[web]: the page, in a process of its own; needs the extra web"""

    listen: Word | None = None
    """HOST:PORT that the page listens on. None: there is no page."""
    token_file: FilePath | None = None
    """File with the token that a visitor needs, read at each request. None: only on a loopback address, without one."""
    hosts: tuple[Word, ...] = ()
    """Names under which the page is reached, besides the machine's own and addresses: those of a proxy, say."""


class RunnersSettings(Section, frozen=True):
    """[runners]: limits and permissions of the built-in task types"""

    reward_callables: tuple[Word, ...] = ()
    """module:callable patterns (`*` allowed) that a task may name as its reward function."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers with a server that training may report to. TensorBoard writes files and is always allowed."""
    cache_max_bytes: Annotated[int, Meta(ge=0)] = 100 * 1024**3
    """Limit of the cache that tasks share: downloads, prepared datasets, what vLLM compiled."""
    unpack_max_bytes: Annotated[int, Meta(ge=0)] = 500 * 1024**3
    """Limit for the unpacked content of one downloaded archive."""
    unpack_max_files: Annotated[int, Meta(ge=1)] = 100_000
    agents_dir: FilePath | None = None
    """Agent configurations, one YAML file each. None: conf/agents in the working directory, else the built-in ones."""
    agent_network: bool = False
    """Whether code that an agent runs may use the network."""


class EnvironmentSettings(Section, frozen=True):
    """[environments.NAME]: a Python interpreter and its packages"""

    python: AbsolutePath | None = None
    """Path of the interpreter, which must exist. None: the supervisor's own."""
    preload: tuple[ModuleName, ...] = ()
    """Modules that its fork server imports before the first task."""
    warm: Warm = True
    """True: imported in a quiet moment after the start. "at start": beside the node's own start. "on first use": by the
    first task. False: the same, and its fork server ends when no task has used it for ten minutes."""


class TaskTypeSettings(Section, frozen=True):
    """[task_types.NAME]: an additional task type, or another environment for a built-in one"""

    runner: RunnerName | None = None
    """module:Class. None: the built-in one of that name."""
    environment: Name | None = None
    """An `[environments.NAME]`, or one of the built-in `default` and `light`. None: the built-in choice."""


class Settings(Section, frozen=True):
    """All settings."""

    node: NodeSettings = NodeSettings()
    redis: RedisSettings = RedisSettings()
    queue: QueueSettings = QueueSettings()
    results: ResultsSettings = ResultsSettings()
    tasks: TasksSettings = TasksSettings()
    delivery: DeliverySettings = DeliverySettings()
    cloud: CloudSettings = CloudSettings()
    archive: ArchiveSettings = ArchiveSettings()
    processes: ProcessesSettings = ProcessesSettings()
    gpu: GpuSettings = GpuSettings()
    slots: tuple[SlotSettings, ...] = ()
    metrics: MetricsSettings = MetricsSettings()
    notify: NotifySettings = NotifySettings()
    otel: OtelSettings = OtelSettings()
    web: WebSettings = WebSettings()
    runners: RunnersSettings = RunnersSettings()
    environments: dict[Name, EnvironmentSettings] = {}
    task_types: dict[Name, TaskTypeSettings] = {}
