"""`flowmesh doctor`: checks this machine and its settings, and prints a fix for each problem.

Starts nothing and changes nothing. Exits with EXIT_FAILURE if something is broken, not for notes and warnings.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from flowmesh import installed
from flowmesh.cli import (
    doctor_gpus,
    doctor_machine,
    doctor_page,
    doctor_s3,
    locate,
    node_ends,
    notify,
    redis_limits,
    render,
)
from flowmesh.cli.control import Control, NotPermitted
from flowmesh.cli.control_types import PageStatus
from flowmesh.cli.findings import Finding, Level, count, show
from flowmesh.errors import EXIT_FAILURE, EXIT_OK, ConfigError, DeviceError, FlowMeshError, UnavailableError
from flowmesh.node import cuda_build
from flowmesh.node.devices import Inventory
from flowmesh.redaction import redact_url
from flowmesh.settings import load, paths
from flowmesh.settings.schema import Settings
from flowmesh.startup import environments
from flowmesh.tasks.catalogue import DELIVERY, OFF


@click.command(
    help="Check this machine and its settings: driver, GPUs, cgroups, limits, disk, environments, Redis. "
    "Print a fix for each problem. Exits with 1 if something is broken."
)
@locate.config_option
@locate.json_option
def doctor(config: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    if as_json:
        findings = list(examine(config))
        broken = count(findings, Level.BROKEN)
        render.print_json({"ok": not broken, "findings": msgspec.to_builtins(findings)})
    else:
        findings = show(examine(config))
        broken, warnings = count(findings, Level.BROKEN), count(findings, Level.WARN)
        parts = [f"{broken} broken"] if broken else []
        parts += [render.count(warnings, "warning")] if warnings else []
        print(f"\n{', '.join(parts)}" if parts else "\nno problems found")
    return EXIT_FAILURE if broken else EXIT_OK


def examine(config_file: str | None) -> Iterator[Finding]:
    """All findings, area by area; the slow checks come last."""
    yield from _installation()
    path = None if config_file is None else Path(config_file)
    try:
        loaded = load.load(path, os.environ)
        settings = loaded.settings
        where = config_file or "the environment and the defaults"
        yield Finding("settings", Level.OK, f"valid, from {where}")
    except ConfigError as error:
        settings = Settings()
        yield Finding("settings", Level.BROKEN, str(error), "correct it; the checks below use the default settings")
    node = list(_node(settings))
    runs = bool(node) and node[0].level is not Level.NOTE
    yield from node
    yield from node_ends.check(settings)
    seen = doctor_gpus.look()
    yield from doctor_gpus.gpus(settings, os.environ, seen, node_runs=runs)
    inventory = Inventory() if isinstance(seen, DeviceError) else seen.inventory
    has_gpus = bool(inventory.gpus)
    yield from doctor_machine.isolation(settings)
    yield doctor_machine.separation(settings)
    yield from doctor_machine.limits(has_gpus=has_gpus)
    yield from doctor_machine.disk(settings, os.environ)
    yield from doctor_machine.tools(settings)
    yield from _environments(settings, inventory)
    yield from doctor_s3.s3(settings)
    yield from _redis(settings)
    yield from notify.check(settings)
    yield from doctor_page.check(settings, _page(settings))


def _page(settings: Settings) -> PageStatus | None:
    with contextlib.suppress(FlowMeshError), Control(paths.state_dir(settings, os.environ)) as control:
        return control.status().page
    return None


def _installation() -> Iterator[Finding]:
    """This copy of the program, and whether another distribution interferes with it."""
    others = installed.other_owners()
    if problem := installed.problem():
        yield Finding("installation", Level.BROKEN, problem, f"pip uninstall {' '.join(others)}" if others else "")
    elif others:
        names = " and ".join(others)
        text = f"{names}: has the package or command 'flowmesh' too; whichever was installed last wins"
        remedy = (
            f"pip uninstall {' '.join(others)}, then: {installed.install_command()}; or use the command flowmesh-node"
        )
        yield Finding("installation", Level.WARN, text, remedy)
    else:
        yield Finding("installation", Level.OK, f"{installed.DISTRIBUTION} {installed.version()}, {installed.ROOT}")


def _node(settings: Settings) -> Iterator[Finding]:
    """The node that runs on this machine, if any."""
    try:
        with Control(paths.state_dir(settings, os.environ)) as control:
            status = control.status()
            workers = control.status_json().get("workers", [])
    except NotPermitted as error:
        yield Finding("node", Level.WARN, str(error))
        return
    except UnavailableError:
        yield Finding("node", Level.NOTE, "not running")
        return
    except FlowMeshError as error:
        yield Finding("node", Level.BROKEN, str(error), "read the node's log; restart the node if it hangs")
        return
    held, slots = render.count(len(status.tasks), "task"), render.count(len(workers), "worker")
    yield Finding("node", Level.OK, f"running: pid {status.pid}, {held}, {slots}")
    remedy = "remove the cause; the node then starts tasks again by itself"
    for fault in status.faults:
        who = f"{', '.join(fault.workers)} degraded" if fault.workers else fault.name
        text = f"{who} for {render.seconds(fault.since_s)}: {fault.reason}"
        yield Finding("node", Level.BROKEN, text, remedy)
    known = [fault.reason for fault in status.faults]
    for name, warning in status.warnings.items():
        if warning not in known:
            yield Finding("node", Level.WARN, f"environment {name}: {warning}")


def _environments(settings: Settings, inventory: Inventory) -> Iterator[Finding]:
    """Each environment with its task types, and why the other task types are not offered."""
    try:
        catalogue, table = environments.plan(settings)
    except ConfigError as error:
        yield Finding("environments", Level.BROKEN, str(error), "correct that setting")
        return
    for name, environment in table.items():
        types = sorted(offered.name for offered in catalogue.offered.values() if offered.environment == name)
        if name != DELIVERY and types:
            yield Finding("environments", Level.OK, f"{name} ({environment.python}): {', '.join(types)}")
            needs_torch = any("torch" in catalogue.offered[task_type].requires for task_type in types)
            if inventory.gpus and needs_torch:
                yield from _torch(name, environment.python, inventory)
    reasons: dict[str, list[str]] = {}
    for name, why in catalogue.missing.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        lacking, _, command = why.partition(" not installed: ")
        listed = ", ".join(sorted(names))
        if command:
            yield Finding("environments", Level.NOTE, f"not offered: {listed} ({lacking} not installed)", command)
        elif why.startswith(OFF):
            yield Finding("environments", Level.NOTE, f"not offered: {listed} (off)", why.removeprefix(OFF))
        else:
            remedy = "repair that interpreter, or set environments.NAME.python to another one"
            yield Finding("environments", Level.BROKEN, f"not offered: {listed} ({why})", remedy)


def _torch(name: str, python: str, inventory: Inventory) -> Iterator[Finding]:
    """Whether an environment's torch fits driver and GPUs."""
    build = cuda_build.ask(python)
    if isinstance(build, cuda_build.Mismatch):
        yield Finding("environments", Level.BROKEN, f"{name}: {build.text}", build.remedy)
        return
    level = Level.WARN if build.cuda is None else Level.BROKEN  # without CUDA its tasks run, on the CPU
    for mismatch in cuda_build.mismatches(build, inventory, python):
        yield Finding("environments", level, f"{name}: {mismatch.text}", mismatch.remedy)


def _redis(settings: Settings) -> Iterator[Finding]:
    url = settings.redis.url
    if url is None:
        text = "redis.url is not set: a node cannot start (`flowmesh run` needs no Redis)"
        yield Finding("Redis", Level.WARN, text, "export REDIS_URL=redis://HOST:6379/0")
        return
    began = time.monotonic()
    try:
        with locate.connected(locate.address_of(settings.redis)) as client:
            client.ping()
            limits = redis_limits.read(client)
    except FlowMeshError as error:
        yield Finding("Redis", Level.BROKEN, str(error), "start Redis, or correct REDIS_URL (redis.url)")
        return
    yield Finding("Redis", Level.OK, f"{redact_url(url)} answers ({(time.monotonic() - began) * 1000:.0f} ms)")
    yield _redis_limits(limits)


def _redis_limits(limits: redis_limits.RedisLimits) -> Finding:
    mib = redis_limits.MIB
    where = "" if limits.known else " (Redis' defaults: this login may not read the real ones with CONFIG GET)"
    soft = f", above {limits.soft / mib:.1f} MiB not often" if limits.soft else ""
    text = f"task documents of up to {limits.largest / mib:.1f} MiB reach nodes{soft}{where}"
    if limits.largest < redis_limits.RedisLimits().largest:
        remedy = 'redis-cli CONFIG SET client-output-buffer-limit "pubsub 64mb 32mb 60", and proto-max-bulk-len 512mb'
        return Finding("Redis", Level.WARN, f"{text}; a larger one cuts off every node", remedy)
    return Finding("Redis", Level.OK, text)
