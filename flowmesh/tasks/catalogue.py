"""The task types: each with its runner, its environment and the modules it needs. Runners appear as names only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Mapping

import msgspec

from flowmesh import installed
from flowmesh.errors import FieldError, NotOfferedError
from flowmesh.settings.schema import Settings, TasksSettings
from flowmesh.validation.convert import nearest

LIGHT = "light"
"""The built-in environment of tasks without heavy libraries: the node's own interpreter, nothing preloaded."""
DELIVERY = "delivery"
"""The environment of delivery children: like LIGHT, with the upload libraries preloaded."""
DEFAULT = "default"
"""The environment of all other types where the settings name none: the node's own interpreter."""
ENTRY_POINTS = "flowmesh.runners"
"""The entry point group in which other packages register task types."""
AGENT_CHECK = "runners.checks:agent_config"
"""`(path, content) -> Checked`: checks a file of the agents folder."""
AGENT_TYPE = "runners.schemas:agent_config"
"""`() -> type` of a configuration of agents."""
OFF = "it is off; "
"""Beginning of the reason why a type is not offered that the operator has not allowed."""
PROBE_TIMEOUT_S = 60.0


class TaskType(msgspec.Struct, frozen=True, kw_only=True):
    """A value of `spec.taskType` and how it runs."""

    name: str
    runner: str
    """`module:Class`."""
    check: str = ""
    """`module:function` that checks a document of this type without running it: `(task, task_type) -> Checked`. Its
    module is light. Empty: there is none."""
    sections: str = ""
    """`module:function` that names the sections of such a document: `(task_type) -> {field: type}`, where a mapping of
    types is chosen by the section's field `type`. For the JSON Schema."""
    exporter: str = ""
    """`module:function` that makes the export which a document asks for, of the finished items of a failed task:
    `(postprocess, items) -> (path below the task's folder, content, fields of the result's jsonl_export)`. Its module
    is light. Empty: the type has none."""
    environment: str = DEFAULT
    heavy: bool = False
    """Whether its tasks may use GPUs and much of /dev/shm although their environment is `light`."""
    requires: tuple[str, ...] = ()
    """Top-level modules without which the type cannot run."""
    extra: str = ""
    """The extra of flowmesh-supervisor that installs them."""
    reads_ahead: bool = True
    """Whether its runner can do something before its task has the slot: `runners.api.Runner.ahead`."""
    on_several_nodes: bool = False
    """Whether a document of this type may ask for several nodes (`spec.nodes`)."""
    allowed_by: str = ""
    """A setting of [tasks] that lists what such tasks may do; while it is empty the type is off. Empty: always on."""
    preload: tuple[str, ...] = ()
    """What the environment's fork server imports before it forks; see processes.preload.load."""
    continues_from: tuple[str, ...] = ()
    """What a new attempt finds in the task's folder, besides checkpoints and rows; its runner removes what is stale."""
    served_field: str = ""
    """The field below `spec` that may name a serving task, as `task:ID`, in place of an address."""
    preload_with: dict[str, str] = {}
    """More of it, by the optional module that makes it useful."""

    @property
    def is_light(self) -> bool:
        """Whether its tasks get no GPU, and no /dev/shm of their own."""
        return self.environment == LIGHT and not self.heavy


_TRAINING = {
    "sft": "Sft",
    "lora_sft": "LoraSft",
    "dpo": "Dpo",
    "ppo": "Ppo",
    "grpo": "Grpo",
    "rloo": "Rloo",
    "kto": "Kto",
    "reward": "Reward",
}

BUILTIN = (
    TaskType(
        name="echo",
        reads_ahead=False,
        runner="runners.echo:EchoRunner",
        check="runners.checks:echo",
        sections="runners.schemas:echo",
        environment=LIGHT,
        on_several_nodes=True,
        preload=("runners.echo",),
    ),
    TaskType(
        name="command",
        reads_ahead=False,
        runner="runners.command.runner:CommandRunner",
        check="runners.checks:command",
        sections="runners.schemas:command",
        environment=LIGHT,
        on_several_nodes=True,
        heavy=True,
        allowed_by="allow_command",
        preload=("runners.command.runner",),
    ),
    TaskType(
        name="python",
        reads_ahead=False,
        runner="runners.command.runner:PythonRunner",
        check="runners.checks:python",
        sections="runners.schemas:command",
        on_several_nodes=True,
        allowed_by="allow_command",
        preload=("runners.command.runner",),
    ),
    TaskType(
        name="inference",
        runner="runners.inference.runner:InferenceRunner",
        check="runners.checks:inference",
        sections="runners.schemas:inference",
        exporter="runners.inference.export:of_finished",
        on_several_nodes=True,
        requires=("torch", "transformers"),
        extra="inference",
        preload=("runners.inference.preload:TRANSFORMERS",),
        preload_with={"vllm": "runners.inference.preload:VLLM"},
    ),
    TaskType(
        name="serve",
        runner="runners.serve.runner:ServeRunner",
        check="runners.checks:serve",
        sections="runners.schemas:serve",
        requires=("torch", "transformers", "fastapi", "uvicorn"),
        extra="serve",
        allowed_by="allow_serve",
        preload=("runners.inference.preload:TRANSFORMERS",),
        preload_with={"vllm": "runners.inference.preload:VLLM"},
    ),
    *(
        TaskType(
            name=name,
            runner=f"runners.training.runner:{prefix}Runner",
            check="runners.checks:training",
            sections="runners.schemas:training",
            on_several_nodes=True,
            requires=("torch", "transformers", "accelerate", "peft", "datasets", "trl"),
            extra="training",
            preload=("runners.training.preload:TRAINING",),
        )
        for name, prefix in _TRAINING.items()
    ),
    TaskType(
        name="rag",
        runner="runners.rag.runner:RagRunner",
        check="runners.checks:rag",
        sections="runners.schemas:rag",
        requires=("torch", "transformers", "sentence_transformers", "faiss"),
        extra="rag",
        preload=("runners.rag.preload:RAG",),
    ),
    *(
        TaskType(
            name=name,
            runner=runner,
            check=f"runners.checks:{name}",
            sections=f"runners.schemas:{name}",
            requires=("torch", "transformers", "sentence_transformers"),
            extra="rag",
            preload=(preload,),
        )
        for name, runner, preload in (
            ("embedding", "runners.vectors.runner:EmbeddingRunner", "runners.vectors.preload:VECTORS"),
            ("score", "runners.scoring.runner:ScoreRunner", "runners.vectors.preload:SCORE"),
        )
    ),
    TaskType(
        name="api",
        reads_ahead=False,
        runner="runners.remote.runner:ApiRunner",
        check="runners.checks:api",
        sections="runners.schemas:api",
        environment=LIGHT,
        requires=("openai", "httpx2"),
        extra="api",
        served_field="api.base_url",
    ),
    TaskType(
        name="agent",
        reads_ahead=False,
        runner="runners.agent.runner:AgentRunner",
        check="runners.checks:agent",
        sections="runners.schemas:agent",
        requires=("smolagents", "openai"),
        extra="agent",
        preload=("runners.agent.preload:AGENT",),
        continues_from=("workspace",),
        served_field="agent.base_url",
    ),
)


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """The task types that a node offers, and for the others the reason why not."""

    offered: dict[str, TaskType]
    missing: dict[str, str]
    """By type, the reason, with the remedy."""
    off: frozenset[str] = frozenset()
    """Those of them that the operator has not turned on: not worth a line at each start."""

    def find(self, name: str) -> TaskType:
        """The type of that name.

        Raises:
            NotOfferedError: its libraries are not installed on this node.
            FieldError: there is none.
        """
        if found := self.offered.get(name):
            return found
        if why := self.missing.get(name):
            raise NotOfferedError(f"spec.taskType: {name!r} cannot run on this node: {why}", "spec.taskType")
        tail = nearest(name, list(self.offered))
        known = ", ".join(sorted(self.offered))
        hint = f"{tail} known: {known}" if "did you mean" in tail else tail
        raise FieldError(f"spec.taskType: unknown type {name!r}; {hint}", "spec.taskType")


def known_types(settings: Settings) -> dict[str, TaskType]:
    """Built-in types, other packages' types (entry points) and the settings' types; later ones override earlier ones.

    Raises:
        FieldError: a type in the settings has no runner.
    """
    types = {builtin.name: builtin for builtin in BUILTIN}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        types[entry.name] = TaskType(name=entry.name, runner=entry.value)
    for name, configured in settings.task_types.items():
        base = types.get(name)
        runner = configured.runner or (base.runner if base else None)
        if runner is None:
            raise FieldError(f"task_types.{name}.runner: missing; a type that is not built in needs module:Class", name)
        base = base if base is not None and runner == base.runner else TaskType(name=name, runner=runner)
        types[name] = msgspec.structs.replace(base, environment=configured.environment or base.environment)
    return types


def catalogue(
    types: Mapping[str, TaskType], interpreters: Mapping[str, str | None], allowed: TasksSettings | None = None
) -> Catalogue:
    """Which types can be offered: those whose required modules are all found by their environment's interpreter.

    Args:
        interpreters: the Python of each environment; None for the node's own.
        allowed: what the operator allows; None: the defaults.
    """
    allowed = TasksSettings() if allowed is None else allowed
    offered: dict[str, TaskType] = {}
    missing: dict[str, str] = {}
    off = frozenset(kind.name for kind in types.values() if kind.allowed_by and not getattr(allowed, kind.allowed_by))
    for environment, python in interpreters.items():
        members = [kind for kind in types.values() if kind.environment == environment]
        modules = {name for kind in members for name in (*kind.requires, *kind.preload_with)}
        absent, problem = _absent(modules, python)
        for kind in members:
            lacking = [name for name in kind.requires if name in absent]
            if kind.name in off:
                missing[kind.name] = f"{OFF}the node's setting tasks.{kind.allowed_by} turns it on"
            elif problem:
                missing[kind.name] = f"environment {environment}: {problem}"
            elif lacking:
                missing[kind.name] = f"{', '.join(lacking)} not installed: {_remedy(kind, python)}"
            else:
                more = tuple(entry for name, entry in kind.preload_with.items() if name not in absent)
                offered[kind.name] = msgspec.structs.replace(kind, preload=kind.preload + more)
    return Catalogue(offered=offered, missing=missing, off=off)


def _remedy(kind: TaskType, python: str | None) -> str:
    if kind.extra:
        return installed.install_command(kind.extra, python)
    return f"{python or sys.executable} -m pip install {' '.join(kind.requires)}"


def _absent(modules: Iterable[str], python: str | None) -> tuple[set[str], str]:
    """Which of `modules` an interpreter does not find (none is imported), and why it could not be run, else empty."""
    names = sorted(modules)
    if python is None:
        return {name for name in names if importlib.util.find_spec(name) is None}, ""
    program = (
        "import importlib.util as u, sys\n"
        "print(*[n for n in ['flowmesh', 'msgspec'] + sys.argv[1:] if u.find_spec(n) is None])"
    )
    try:
        done = subprocess.run(
            [python, "-c", program, *names], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return set(), f"{python} does not run: {error}"
    if done.returncode != 0:
        return set(), f"{python} failed: {done.stderr.strip().splitlines()[-1:]}"
    found = set(done.stdout.split())
    if own := found & {"flowmesh", "msgspec"}:
        return set(), f"{python} lacks {', '.join(sorted(own))}: {installed.install_command(python=python)}"
    return found, ""


def saves_checkpoints(task_type: str) -> bool:
    """Whether tasks of this type can be stopped with a checkpoint, and go on from it."""
    return task_type in _TRAINING
