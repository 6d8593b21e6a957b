"""The node's settings: `conf/node.toml`, overridden by environment variables, overridden by flags; one frozen struct.

A setting that cannot be used is a ConfigError: where it came from, the key, what was found, what is allowed. Secrets
are in neither an error nor a repr.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from flowmesh.errors import ConfigError, FieldError
from flowmesh.messages.checking import convert
from flowmesh.messages.wording import HIDDEN, dotted, quoted, redact_url
from flowmesh.settings_checks import first_fault
from flowmesh.settings_sources import DEFAULT, VARIABLES, Layers, Sections, read_toml
from flowmesh.settings_types import (
    AbsolutePath,
    CpuList,
    FilePath,
    GpuName,
    Isolation,
    LogLevel,
    ModuleName,
    Name,
    PositiveSeconds,
    RunnerName,
    SlotName,
    SlotsMode,
    Token,
    VariableName,
    Word,
)

__all__ = [
    "VARIABLES",
    "Described",
    "Isolation",
    "Loaded",
    "LogLevel",
    "Settings",
    "describe",
    "load",
    "log_file",
    "redact_url",
    "results_dir",
    "state_dir",
]

_REDACTED: dict[str, Callable[[str], str]] = {
    "url": redact_url,
    "orchestrator_url": redact_url,
    "orchestrator_token": lambda _: HIDDEN,
}
"""How each field that is or holds a secret is shown."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all sections of the file have in common."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        pairs = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [(name, _REDACTED[name](it) if name in _REDACTED and it is not None else it) for name, it in pairs]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class NodeSettings(Section, frozen=True):
    """[node]"""

    worker_id: Name | None = None
    """WORKER_ID. None: a random one, kept in state_dir so that it outlives a restart."""
    tags: tuple[Word, ...] = ()
    """WORKER_TAGS"""
    cost_per_hour: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """WORKER_COST_PER_HOUR, USD"""
    log_level: LogLevel = LogLevel.INFO
    """LOG_LEVEL, in any case"""
    log_file: FilePath | None = None
    """JSON lines; rotated."""
    state_dir: FilePath | None = None
    """Journal, sockets, spool. None: see `state_dir()`."""
    elastic_scaling: bool = True
    """ENABLE_ELASTIC_SCALING"""
    slots: SlotsMode = SlotsMode.ALL
    """What `[[slots]]` says in detail, in one word."""


class RedisSettings(Section, frozen=True):
    """[redis]"""

    url: str | None = None
    """REDIS_URL, its scheme in any case"""
    task_topic: Word = "tasks"
    """TASK_TOPIC"""
    heartbeat_interval_s: PositiveSeconds = 30.0
    """HEARTBEAT_INTERVAL_SEC"""
    timeout_s: PositiveSeconds = 5.0
    """Connecting, and each command's answer."""
    health_check_interval_s: PositiveSeconds = 15.0
    """How often a silent connection is asked whether it lives."""
    stream: bool = False
    """Whether each worker also takes tasks from the Redis Stream `tasks:WORKER_ID`."""


class ResultsSettings(Section, frozen=True):
    """[results]"""

    dir: FilePath = "./results_workers"
    """RESULTS_DIR"""
    allowed_roots: tuple[AbsolutePath, ...] = ()
    """Absolute folders besides `dir` that a task's output.destination.path may lie under."""
    min_free_bytes: Annotated[int, Meta(ge=0, le=2**62)] = 1024**3
    """Free space that `dir`, the state folder and a task's own folder need before a task is started. 0: any."""
    wait_for_room_s: PositiveSeconds = 60.0
    """How long tasks wait for it before they go back to the orchestrator."""
    keep_days: Annotated[float, Meta(gt=0, le=36500)] | None = None
    """Results of finished tasks that are older are removed. None: never."""
    keep_bytes: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    """The oldest results are removed while all of them are larger. None: never."""


class TasksSettings(Section, frozen=True):
    """[tasks]"""

    cancel_grace_s: PositiveSeconds = 10.0
    """From the cancel frame to SIGTERM."""
    term_grace_s: PositiveSeconds = 5.0
    """From SIGTERM to SIGKILL of the whole tree."""
    default_timeout_s: PositiveSeconds | None = None
    """For tasks without timeoutSec. None: no limit."""
    pass_env: tuple[VariableName, ...] = ()
    """Names (`*` allowed) that a task inherits from the node's environment, besides the built-in ones."""
    allow_env: tuple[VariableName, ...] = ()
    """Names (`*` allowed) that a task's spec.env may set."""
    hang_timeout_s: PositiveSeconds | None = None
    """A task that says nothing for this long has its stacks saved and is stopped. None: never."""
    log_max_bytes: Annotated[int, Meta(ge=65536)] = 64 * 1024 * 1024
    """Each log file of a task; of one that grows over it only the end is kept."""


class DeliverySettings(Section, frozen=True):
    """[delivery]"""

    orchestrator_url: str | None = None
    """ORCHESTRATOR_BASE_URL"""
    orchestrator_token: Token | None = None
    """ORCHESTRATOR_TOKEN"""
    bandwidth_bytes_per_sec: Annotated[int, Meta(ge=1, le=2**62)] | None = None
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
    """Where the system allows it: tasks of heavy environments have a /dev/shm of their own."""
    task_user: Word | None = None
    """User that tasks run as; only root can use it. None: the node's own."""
    task_nice: Annotated[int, Meta(ge=0, le=19)] = 0
    task_memory_max_bytes: Annotated[int, Meta(ge=16 * 1024 * 1024)] | None = None
    """memory.max of each task's cgroup."""
    task_pids_max: Annotated[int, Meta(ge=8)] | None = None
    """pids.max of each task's cgroup."""


class GpuSettings(Section, frozen=True):
    """[gpu]"""

    allow_foreign: bool = False
    """Whether tasks start on a GPU that somebody else's process is on."""
    release_timeout_s: PositiveSeconds = 30.0
    """How long a task's GPUs may take to be empty again before their slot is closed."""
    release_tolerance_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 64 * 1024 * 1024
    """What a GPU may have in use above what it had before the task."""
    sample_interval_s: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    """Between two looks at the GPUs of running tasks."""
    probe_interval_s: PositiveSeconds = 60.0
    """The longest pause between two probes of a closed slot; the first is a second."""
    canary: RunnerName = "runners.canary:check_gpu"
    """What has to run well on a GPU that had a fault, in a child, before tasks do."""


class SlotSettings(Section, frozen=True):
    """[[slots]]: what one task at a time may have"""

    name: SlotName
    gpus: tuple[GpuName, ...] = ()
    cpus: CpuList | None = None
    """CPU numbers that its tasks are confined to. None: those that no other slot names, shared by all such slots."""


class RunnersSettings(Section, frozen=True):
    """[runners]: what task types obey"""

    reward_callables: tuple[Word, ...] = ()
    """module:callable patterns (`*` allowed) that a task may name as its reward function."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers with a server that training may report to. TensorBoard writes files and is always allowed."""
    cache_max_bytes: Annotated[int, Meta(ge=0)] = 100 * 1024**3
    """What tasks keep for each other: downloads, datasets as they are read, what vLLM compiled."""
    unpack_max_bytes: Annotated[int, Meta(ge=0)] = 500 * 1024**3
    """Content of one downloaded archive."""
    unpack_max_files: Annotated[int, Meta(ge=1)] = 100_000
    agents_dir: FilePath | None = None
    """Agent configurations, one YAML file a name. None: conf/agents where the node runs, else the built-in ones."""
    agent_network: bool = False
    """Whether code that an agent runs may use the network."""


class EnvironmentSettings(Section, frozen=True):
    """[environments.NAME]: a Python interpreter with its own packages"""

    python: AbsolutePath | None = None
    """An interpreter that exists. None: the supervisor's own."""
    preload: tuple[ModuleName, ...] = ()
    """Modules that its fork server imports before the first task."""


class TaskTypeSettings(Section, frozen=True):
    """[task_types.NAME]: a task type of your own, or another environment for a built-in one"""

    runner: RunnerName | None = None
    """module:Class. None: the built-in one of that name."""
    environment: Name | None = None
    """An `[environments.NAME]`, or one of the built-in `default` and `light`. None: the built-in choice."""


class Settings(Section, frozen=True):
    """Everything that can be set."""

    node: NodeSettings = NodeSettings()
    redis: RedisSettings = RedisSettings()
    results: ResultsSettings = ResultsSettings()
    tasks: TasksSettings = TasksSettings()
    delivery: DeliverySettings = DeliverySettings()
    archive: ArchiveSettings = ArchiveSettings()
    processes: ProcessesSettings = ProcessesSettings()
    gpu: GpuSettings = GpuSettings()
    slots: tuple[SlotSettings, ...] = ()
    runners: RunnersSettings = RunnersSettings()
    environments: dict[Name, EnvironmentSettings] = {}
    task_types: dict[Name, TaskTypeSettings] = {}


class Loaded(msgspec.Struct, frozen=True):
    """Settings, and who set what."""

    settings: Settings
    origins: dict[str, str]
    """Key to file, variable or `command line`. A key that is not here has its default."""


class Described(msgspec.Struct, frozen=True):
    """One setting as `--check` reports it."""

    key: str
    value: Any
    """Plain data; secrets are redacted."""
    origin: str
    """`default`, the file, the environment variable, or `command line`."""

    @property
    def text(self) -> str:
        """The value as it would stand in the file; `-` where there is none."""
        return _text(self.value)


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Loaded:
    """The settings of the file, the environment over it, and the command line over both.

    Args:
        path: the node's file; None: only variables and flags.
        overrides: dotted key to text, from `--set KEY=VALUE` and flags of their own (`redis.url`).

    Raises:
        ConfigError: one line with the origin, the key, what was found and what is allowed.
    """
    layers = Layers(Sections(Settings))
    if path is not None:
        layers.add_file(read_toml(path), str(path))
    layers.add_environ(environ)
    layers.add_flags(overrides or {})
    node = layers.values.get("node", {})
    if isinstance(level := node.get("log_level"), str):
        node["log_level"] = level.upper()
    redis = layers.values.get("redis", {})
    if isinstance(url := redis.get("url"), str):
        redis["url"] = _with_lower_scheme(url)
    try:
        settings = convert(layers.values, Settings, where="")
    except FieldError as error:
        raise ConfigError(f"{layers.origin_of(error.path)}: {error}") from None
    if fault := first_fault(settings):
        key = dotted("", fault.path)
        raise ConfigError(f"{layers.origin_of(key)}: {key}: {fault.what}")
    return Loaded(settings, layers.origins)


def _with_lower_scheme(url: str) -> str:
    """redis-py knows a scheme in lower case only, and an address may have it in any."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme.lower()}://{rest}" if separator else url


def describe(loaded: Loaded) -> list[Described]:
    """Every setting, in the order of the file."""
    described = []
    for path, section in _sections(loaded.settings):
        for name, value in section.__rich_repr__():
            key = dotted("", (*path, name))
            given = key if key in loaded.origins else path[0]  # a list is set as a whole
            described.append(Described(key, msgspec.to_builtins(value), loaded.origins.get(str(given), DEFAULT)))
    return described


def _sections(settings: Settings) -> Iterator[tuple[tuple[str | int, ...], Section]]:
    for name in settings.__struct_fields__:
        match getattr(settings, name):
            case Section() as section:
                yield (name,), section
            case dict() as named:
                for inner, section in named.items():
                    yield (name, inner), section
            case tuple() as listed:
                for index, section in enumerate(listed):
                    yield (name, index), section


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case str():
            return quoted(value, limit=None)
        case list() | tuple():
            return f"[{', '.join(map(_text, value))}]"
    return str(value)


# ---- folders ---------------------------------------------------------------------------------------------------------


def results_dir(settings: Settings) -> Path:
    """The root of all outputs, absolute."""
    return _absolute(settings.results.dir, "results.dir")


def log_file(settings: Settings) -> Path | None:
    """The node's own log, absolute; None: no file."""
    return None if settings.node.log_file is None else _absolute(settings.node.log_file, "node.log_file")


def state_dir(settings: Settings, environ: Mapping[str, str], *, euid: int | None = None) -> Path:
    """The node's own folder: journal, sockets, spool. Absolute.

    Args:
        euid: who we are, where it is not the process's own effective user.

    Raises:
        ConfigError: it depends on a home directory, and there is none.
    """
    if settings.node.state_dir is not None:
        return _absolute(settings.node.state_dir, "node.state_dir")
    # systemd names the folders of StateDirectory= here, the first one first.
    if first := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(first).absolute()
    if (os.geteuid() if euid is None else euid) == 0:
        return Path("/var/lib/flowmesh")
    state_home = Path(environ.get("XDG_STATE_HOME", ""))
    if state_home.is_absolute():  # its specification has relative ones ignored
        return state_home / "flowmesh"
    home = environ.get("HOME") or "~"
    return _absolute(home, "node.state_dir") / ".local" / "state" / "flowmesh"


def _absolute(text: str, key: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(
            f"{key}: {quoted(text)} needs a home directory, and there is none; give a full path"
        ) from None
