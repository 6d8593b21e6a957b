"""`flowmesh examples`: the task files that are installed with the node."""

from __future__ import annotations

from pathlib import Path

import click

from flowmesh import installed
from flowmesh.cli import completing, render
from flowmesh.errors import EXIT_OK, ConfigError
from flowmesh.validation.describe import nearest

MODELINE = "# yaml-language-server: $schema="
"""Begins the line that tells editors which schema a document has."""


@click.command(help="List the example tasks, or print one: `flowmesh examples echo > echo.yaml`.")
@click.argument("name", required=False, shell_complete=completing.examples)
@click.option(
    "--copy", "folder", type=click.Path(file_okay=False), metavar="DIR", help="Copy all of them, with their data."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def examples(name: str | None, folder: str | None, as_json: bool) -> int:
    """Run the command; returns the exit code."""
    source = installed.conf() / "tasks"
    paths = [*sorted(source.glob("*.yaml")), *sorted((source / "pipelines").glob("*.yaml"))]
    files = {path.relative_to(source).with_suffix("").as_posix(): path for path in paths}
    if folder is not None:
        return _copy(source, Path(folder))
    if name is not None:
        if name not in files:
            raise ConfigError(f"no example {name!r}; {nearest(name, list(files))}")
        print(_text(files[name]), end="")
        return EXIT_OK
    described = {name: _first_comment(path) for name, path in files.items()}
    if as_json:
        render.print_json({"examples": described})
        return EXIT_OK
    width = max(map(len, described))
    for each, text in described.items():
        print(f"{each:<{width}}  {text}".rstrip())
    return EXIT_OK


def _copy(source: Path, folder: Path) -> int:
    """Copy every file that is not there yet."""
    for path in sorted(source.rglob("*")):  # of this package
        to = folder / path.relative_to(source)
        try:
            if path.is_dir():
                to.mkdir(parents=True, exist_ok=True)
            elif to.exists():
                print(f"kept  {to}")
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(_text(path).encode() if path.suffix == ".yaml" else path.read_bytes())
                print(f"made  {to}")
        except OSError as error:
            raise ConfigError(f"{to}: cannot be written: {error.strerror}") from None
    return EXIT_OK


def _text(path: Path) -> str:
    """An example whose line for editors names the installed schema, as it is read from another folder."""
    return path.read_text().replace(f"{MODELINE}../", f"{MODELINE}{installed.conf()}/")


def _first_comment(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith(MODELINE):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".:")
