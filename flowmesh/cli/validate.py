"""`flowmesh validate`: all that is wrong with files, each with its line. Starts nothing and opens nothing they name."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from flowmesh.cli import locate, render
from flowmesh.cli.checked_file import CheckedFile, FileKind, check_file
from flowmesh.errors import EXIT_CONFIG, EXIT_OK
from flowmesh.messages.text import escaped
from flowmesh.settings.schema import Settings
from flowmesh.tasks.catalogue import known_types


@click.command(
    help="Check task documents and pipelines, configurations of agents and node settings without running anything. "
    "Exits with 0, or with 78 where a file has errors."
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--kind",
    type=click.Choice(["task", "pipeline", "agent", "node"]),
    help="What the files are; else as their content shows.",
)
@locate.config_option
@locate.json_option
def validate(*, files: tuple[str, ...], kind: FileKind | None, config: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    settings = locate.settings(config) if config else None
    types = known_types(settings or Settings())
    cloud = None if settings is None else settings.cloud
    checked = [check_file(file, types, kind, cloud) for file in files]
    ok = all(each.ok for each in checked)
    if as_json:
        render.print_json({"ok": ok, "files": [_as_data(each) for each in checked]})
    else:
        for each in checked:
            _print(each)
    return EXIT_OK if ok else EXIT_CONFIG


def _as_data(checked: CheckedFile) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(checked)
    return {"ok": checked.ok, **data}


def _print(checked: CheckedFile) -> None:
    for error in checked.errors:
        print(f"{checked.file}:{error.line}: {escaped(error.message)}")
    for warning in checked.warnings:
        print(f"{checked.file}:{warning.line}: warning: {escaped(warning.message)}")
    if checked.ok:
        what = {
            "task": f"task of type {checked.task_type}",
            "pipeline": "pipeline",
            "agent": "agents",
            "node": "node settings",
        }
        print(f"{checked.file}: valid ({what.get(checked.kind or 'task', checked.kind)})")
