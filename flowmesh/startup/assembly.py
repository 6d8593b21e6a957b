"""Builds the executor from settings and machine."""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh.execution import permits
from flowmesh.execution.executor import Executor
from flowmesh.execution.layout import Layout, Owner
from flowmesh.execution.ports import SendingsOf
from flowmesh.execution.run import Run
from flowmesh.messages.gateway import Gateway
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.processes import environ
from flowmesh.processes.server_pool import ServerPool
from flowmesh.redaction import Redactor
from flowmesh.settings.paths import results_dir
from flowmesh.settings.schema import Settings
from flowmesh.settings.secret_files import has_token
from flowmesh.startup import environments
from flowmesh.startup.preflight import Fitted
from flowmesh.tasks.journal import Journal


def make_executor(
    settings: Settings,
    fitted: Fitted,
    owner: Owner | None,
    journal: Journal,
    state_dir: Path,
    *,
    node_id: str,
    nvml: Nvml,
    power: PowerMeter,
    environment: Mapping[str, str],
    secrets: Redactor,
    sendings_of: SendingsOf,
    traces: bool,
) -> Executor:
    """The executor of a node, with its fork servers and folders.

    Args:
        fitted: the settings applied to this machine.
        owner: the user that tasks run as; None: the node's own.
        environment: the node's own variables.
        secrets: knows the node's secrets.
        sendings_of: what webhooks and trace collectors are told of a task's end.
        traces: whether spans are sent.
    """
    base_env = environ.base(environment, settings.tasks.pass_env)
    catalogue, environment_table = environments.plan(settings)
    pool = ServerPool(
        environment_table,
        folder=state_dir / "run",
        log_folder=state_dir / "log",
        env=environ.for_server(base_env) | {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in fitted.gpus)},
        adoption_timeout_s=settings.processes.adoption_timeout_s,
        cgroup=fitted.cgroup,
        mark=node_id,
    )
    layout = Layout(
        state_dir=state_dir,
        results_dir=results_dir(settings),
        work_dir=Path.cwd(),
        mark=node_id,
        base_env=base_env,
        cgroup=fitted.cgroup,
        processes=settings.processes,
        limits=msgspec.to_builtins(settings.runners),
        permits=permits.of_node(settings, state_dir, base_env, owner),
        owner=owner,
        secrets=secrets,
        gateway=_gateway(settings, journal, state_dir),
        traces=traces,
        umask=int(settings.results.umask, 8),
    )
    slots: dict[str, Slot[Run]] = {plan.worker_id: Slot(plan) for plan in fitted.slots}
    return Executor(
        settings=settings,
        catalogue=catalogue,
        journal=journal,
        slots=slots,
        layout=layout,
        pool=pool,
        nvml=nvml,
        power=power,
        gpus=fitted.gpus,
        sendings_of=sendings_of,
    )


def _gateway(settings: Settings, journal: Journal, state_dir: Path) -> Gateway | None:
    """Where tasks find the gateway. The key outlives a restart: running tasks have it."""
    token = settings.delivery.orchestrator_url is not None and has_token(settings.delivery)
    s3 = bool(settings.cloud.read)
    if not token and not s3:
        return None
    key = journal.fact("gateway_key", random.token_hex(16))
    return Gateway(str(state_dir / "gateway" / "socket"), key, token=token, s3=s3)
