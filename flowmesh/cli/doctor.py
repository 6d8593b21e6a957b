"""`flowmesh doctor`: what this machine and its settings are good for, what is wrong, and the command that mends it.

Starts nothing and changes nothing. Ends with 1 where something is broken; notes and warnings are no failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec

from flowmesh import settings_load, settings_paths
from flowmesh.cli import doctor_machine, locate, render
from flowmesh.cli.control import Control
from flowmesh.cli.findings import Finding, Level
from flowmesh.errors import EXIT_FAILURE, EXIT_OK, ConfigError, FlowMeshError, UnavailableError
from flowmesh.execution import lanes
from flowmesh.redaction import redact_url
from flowmesh.settings_schema import Settings
from flowmesh.tasks.types import DELIVERY, PROBE_TIMEOUT_S

_COLOURS = {Level.OK: "green", Level.NOTE: "blue", Level.WARN: "yellow", Level.BROKEN: "red"}
_INDENT = 9


@click.command(help="Look at this machine as a node would: what is fine, what is not, and what mends it.")
@locate.config_option
@locate.json_option
def doctor(config: str | None, as_json: bool) -> int:
    """The command."""
    if as_json:
        findings = list(examine(config))
        broken = _count(findings, Level.BROKEN)
        render.print_json({"ok": not broken, "findings": msgspec.to_builtins(findings)})
    else:
        findings = _show(examine(config))
        broken, warnings = _count(findings, Level.BROKEN), _count(findings, Level.WARN)
        parts = [f"{broken} broken"] if broken else []
        parts += [f"{warnings} could be better"] if warnings else []
        print(f"\n{', '.join(parts)}." if parts else "\nEverything is fine.")
    return EXIT_FAILURE if broken else EXIT_OK


def examine(config_file: str | None) -> Iterator[Finding]:
    """Everything, area by area; slow answers come last."""
    path = None if config_file is None else Path(config_file)
    try:
        loaded = settings_load.load(path, os.environ)
        settings = loaded.settings
        where = config_file or "the environment and the defaults"
        yield Finding("settings", Level.OK, f"good, from {where}")
    except ConfigError as error:
        settings = Settings()
        yield Finding("settings", Level.BROKEN, str(error), "mend it; what follows is about the defaults")
    node = list(_node(settings))
    runs = bool(node) and node[0].level is not Level.NOTE
    yield from node
    gpus = list(doctor_machine.gpus(settings, os.environ, node_runs=runs))
    yield from gpus
    has_gpus = any(each.text.startswith("GPU ") for each in gpus)
    yield from doctor_machine.isolation(settings)
    yield from doctor_machine.limits(has_gpus=has_gpus)
    yield from doctor_machine.disk(settings, os.environ)
    yield from doctor_machine.tools(settings)
    yield from _environments(settings, has_gpus=has_gpus)
    yield from _redis(settings)


def _node(settings: Settings) -> Iterator[Finding]:
    """The node that runs here, if one does."""
    try:
        with Control(settings_paths.state_dir(settings, os.environ)) as control:
            status = control.status()
            workers = control.status_json().get("workers", [])
    except UnavailableError as error:
        refused = "another user's" in str(error)
        yield Finding("node", Level.WARN if refused else Level.NOTE, str(error) if refused else "none runs here now")
        return
    except FlowMeshError as error:
        yield Finding("node", Level.BROKEN, str(error), "flowmesh status; look into its log")
        return
    yield Finding("node", Level.OK, f"runs: pid {status.pid}, {len(status.tasks)} tasks, {len(workers)} workers")
    for worker in workers:
        if reason := worker.get("reason"):
            text = f"{worker.get('worker_id')} takes no GPU tasks: {reason}"
            yield Finding("node", Level.BROKEN, text, "it opens by itself when that is over")
    for name, warning in status.warnings.items():
        yield Finding("node", Level.WARN, f"environment {name}: {warning}")


def _environments(settings: Settings, *, has_gpus: bool) -> Iterator[Finding]:
    """Each environment with the types that it serves, and what the others lack."""
    try:
        catalogue, table = lanes.plan(settings)
    except ConfigError as error:
        yield Finding("environments", Level.BROKEN, str(error), "mend that setting")
        return
    for name, lane in table.items():
        types = sorted(each.name for each in catalogue.offered.values() if each.environment == name)
        if name != DELIVERY and types:
            yield Finding("environments", Level.OK, f"{name} ({lane.python}): {', '.join(types)}")
            needs_torch = any("torch" in catalogue.offered[each].requires for each in types)
            if has_gpus and needs_torch and (problem := _torch_problem(lane.python)):
                yield Finding("environments", Level.WARN, f"{name}: {problem}", "install torch's CUDA build there")
    reasons: dict[str, list[str]] = {}
    for name, why in catalogue.missing.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        lacking, _, command = why.partition(" not installed: ")
        listed = ", ".join(sorted(names))
        if command:
            yield Finding("environments", Level.NOTE, f"not offered: {listed} (without {lacking})", command)
        else:
            yield Finding("environments", Level.BROKEN, f"not offered: {listed} ({why})", "mend that interpreter")


def _torch_problem(python: str) -> str:
    """What keeps this interpreter's torch from the GPUs; empty where nothing shows. Torch itself is not imported."""
    program = (
        "import importlib.util as u, pathlib, runpy\n"
        "at = pathlib.Path(u.find_spec('torch').origin).with_name('version.py')\n"
        "found = runpy.run_path(str(at)); print(found['__version__'], found.get('cuda'))"
    )
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not answer: {error}"
    version, _, cuda = done.stdout.strip().partition(" ")
    return f"torch {version} is built without CUDA: its tasks run on the CPU" if cuda == "None" else ""


def _redis(settings: Settings) -> Iterator[Finding]:
    url = settings.redis.url
    if url is None:
        text = "no redis.url: a node cannot start, `flowmesh run` can"
        yield Finding("Redis", Level.WARN, text, "export REDIS_URL=redis://HOST:6379/0")
        return
    began = time.monotonic()
    try:
        with locate.connected(url) as client:
            client.ping()
    except FlowMeshError as error:
        yield Finding("Redis", Level.BROKEN, str(error), "start it, or mend REDIS_URL (redis.url)")
        return
    yield Finding("Redis", Level.OK, f"{redact_url(url)} answers ({(time.monotonic() - began) * 1000:.0f} ms)")


# ---- print -----------------------------------------------------------------------------------------------------------


def _show(findings: Iterable[Finding]) -> list[Finding]:
    """Print each as it is found; returns them all."""
    shown: list[Finding] = []
    width = render.width(sys.stdout)
    for finding in findings:
        if not shown or shown[-1].area != finding.area:
            click.echo(("" if not shown else "\n") + click.style(finding.area, bold=True))
        mark = click.style(f"  {finding.level.value:<6} ", fg=_COLOURS[finding.level])
        click.echo(mark + _wrap(finding.text, width))
        if finding.remedy:
            click.echo(" " * _INDENT + _wrap(f"→ {finding.remedy}", width, more=2))
        shown.append(finding)
    return shown


def _wrap(text: str, width: int, more: int = 0) -> str:
    lines = textwrap.wrap(
        render.printable(text), max(20, width - _INDENT), break_on_hyphens=False, subsequent_indent=" " * more
    )
    return f"\n{' ' * _INDENT}".join(lines)


def _count(findings: Iterable[Finding], level: Level) -> int:
    return sum(finding.level is level for finding in findings)
