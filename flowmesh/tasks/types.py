"""The task types: which runner each has, where it runs, what must be installed there. Runners are only names here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Iterable, Mapping

import msgspec

from flowmesh.config import Settings
from flowmesh.errors import FieldError
from flowmesh.messages.checking import nearest

LIGHT = "light"
"""The built-in environment of tasks that need no heavy library: the node's own interpreter, nothing preloaded."""
DELIVERY = "delivery"
"""The lane of delivery children: as light, with what an upload needs."""
DEFAULT = "default"
"""The environment of all others where the file names none: the node's own interpreter."""
ENTRY_POINTS = "flowmesh.runners"
PROBE_TIMEOUT_S = 60.0


class TaskType(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    runner: str
    environment: str = DEFAULT
    requires: tuple[str, ...] = ()
    """Top-level modules without which the type cannot run."""
    extra: str = ""
    """The extra of our package that installs them."""
    preload: tuple[str, ...] = ()
    """What the environment's fork server imports for it; see processes.preload.load."""
    preload_with: dict[str, str] = {}
    """More of that, for modules that the type can use and need not have."""


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
    TaskType(name="echo", runner="runners.echo:EchoRunner", environment=LIGHT, preload=("runners.echo",)),
    TaskType(
        name="inference",
        runner="runners.inference.runner:InferenceRunner",
        requires=("torch", "transformers"),
        extra="inference",
        preload=("runners.inference.preload:TRANSFORMERS",),
        preload_with={"vllm": "runners.inference.preload:VLLM"},
    ),
    *(
        TaskType(
            name=name,
            runner=f"runners.training.runner:{prefix}Runner",
            requires=("torch", "transformers", "accelerate", "peft", "datasets", "trl"),
            extra="training",
            preload=("runners.training.preload:TRAINING",),
        )
        for name, prefix in _TRAINING.items()
    ),
    TaskType(
        name="rag",
        runner="runners.rag.runner:RagRunner",
        requires=("torch", "transformers", "sentence_transformers", "faiss"),
        extra="rag",
        preload=("runners.rag.preload:RAG",),
    ),
    TaskType(
        name="agent",
        runner="runners.agent.runner:AgentRunner",
        requires=("smolagents", "openai"),
        extra="agent",
        preload=("runners.agent.preload:AGENT",),
    ),
)


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """The types of a node, and for those it cannot offer, why."""

    offered: dict[str, TaskType]
    missing: dict[str, str]

    def find(self, name: str) -> TaskType:
        """The type of that name.

        Raises:
            FieldError: there is none, or its libraries are not installed here.
        """
        if found := self.offered.get(name):
            return found
        if why := self.missing.get(name):
            raise FieldError(f"spec.taskType: {name!r} cannot run on this node: {why}", "spec.taskType")
        tail = nearest(name, list(self.offered))
        known = ", ".join(sorted(self.offered))
        hint = f"{tail} known: {known}" if "did you mean" in tail else tail
        raise FieldError(f"spec.taskType: unknown type {name!r}; {hint}", "spec.taskType")


def known_types(settings: Settings) -> dict[str, TaskType]:
    """Built-in ones, other packages' (entry points), and the file's, each overriding the one before."""
    types = {each.name: each for each in BUILTIN}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        types[entry.name] = TaskType(name=entry.name, runner=entry.value)
    for name, wanted in settings.task_types.items():
        base = types.get(name)
        runner = wanted.runner or (base.runner if base else None)
        if runner is None:
            raise FieldError(f"task_types.{name}.runner: missing; a type of your own needs module:Class", name)
        base = base if base is not None and runner == base.runner else TaskType(name=name, runner=runner)
        types[name] = msgspec.structs.replace(base, environment=wanted.environment or base.environment)
    return types


def catalogue(types: Mapping[str, TaskType], interpreters: Mapping[str, str | None]) -> Catalogue:
    """What can be offered: a type whose modules are all found by its environment's interpreter.

    Args:
        interpreters: by environment, its Python; None for the node's own.
    """
    offered: dict[str, TaskType] = {}
    missing: dict[str, str] = {}
    for environment, python in interpreters.items():
        here = [each for each in types.values() if each.environment == environment]
        modules = {name for each in here for name in (*each.requires, *each.preload_with)}
        absent, problem = _absent(modules, python)
        for each in here:
            lacking = [name for name in each.requires if name in absent]
            if problem:
                missing[each.name] = f"environment {environment}: {problem}"
            elif lacking:
                missing[each.name] = f"{', '.join(lacking)} not installed: {_remedy(each, python)}"
            else:
                more = tuple(entry for name, entry in each.preload_with.items() if name not in absent)
                offered[each.name] = msgspec.structs.replace(each, preload=each.preload + more)
    return Catalogue(offered=offered, missing=missing)


def _remedy(wanted: TaskType, python: str | None) -> str:
    pip = "pip" if python is None else f"{python} -m pip"
    what = f"'flowmesh-supervisor[{wanted.extra}]'" if wanted.extra else " ".join(wanted.requires)
    return f"{pip} install {what}"


def _absent(modules: Iterable[str], python: str | None) -> tuple[set[str], str]:
    """Which of `modules` an interpreter does not find, without importing any; and why it could not be asked."""
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
        return set(), f"{python} does not answer: {error}"
    if done.returncode != 0:
        return set(), f"{python} failed: {done.stderr.strip().splitlines()[-1:]}"
    found = set(done.stdout.split())
    if own := found & {"flowmesh", "msgspec"}:
        return set(), f"{python} lacks {', '.join(sorted(own))}: {python} -m pip install flowmesh-supervisor"
    return found, ""
