"""What the operator allows documents, as each job carries it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowmesh.execution.layout import Owner
from flowmesh.messages.job import Permits
from flowmesh.settings.schema import Settings

_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "SENTENCE_TRANSFORMERS_HOME")
_TOKENS = ("token", "stored_tokens")
"""Files beside the hub's caches that hold credentials."""


def of_node(settings: Settings, state_dir: Path, env: Mapping[str, str], owner: Owner | None) -> Permits:
    """The permits of all tasks of a node.

    Args:
        env: what tasks see of the node's environment. The task's own `env` does not count: it would choose its roots.
        owner: the user that tasks run as; None: the node's own.
    """
    home = owner.home if owner is not None else env.get("HOME", "")
    cache = env.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = Path(env.get("HF_HOME") or f"{cache}/huggingface").expanduser()
    given = [str(Path(env[name]).expanduser()) for name in _CACHES if env.get(name)]
    tasks = settings.tasks
    return Permits(
        own_user=owner is not None,
        read_roots=tasks.read_roots,
        hidden=(str(state_dir), *(str(hub / name) for name in _TOKENS)),
        caches=(str(hub / "hub"), str(hub / "datasets"), *given),
        trust_remote_code=tasks.trust_remote_code,
        vllm_arguments=tasks.vllm_arguments,
        reasoning_parsers=tasks.reasoning_parsers,
        commands=tasks.allow_command,
        serve=tasks.allow_serve,
        trainer_arguments=tasks.trainer_arguments,
        local_hosts=tasks.local_hosts,
        api_keys=tasks.api_keys,
        orchestrator_url=settings.delivery.orchestrator_url,
        s3_read=settings.cloud.read,
    )
