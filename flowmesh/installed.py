"""How this copy of the program was installed: its version, its configuration files, and what installs an extra.

Another distribution has the import name `flowmesh` and a command of that name. Where both are installed, files of one
overwrite those of the other: so nothing here relies on `flowmesh/__init__.py`.
"""

from __future__ import annotations

import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

DISTRIBUTION = "flowmesh-supervisor"
PACKAGE = "flowmesh"
ROOT = Path(__file__).parents[1]
"""The folder that both packages lie in."""


@cache
def version() -> str:
    """Of the installed distribution; `unknown` for a copy of the source that was not installed."""
    from importlib import metadata  # with the parsers of e-mail and zip: only where it is needed

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def conf() -> Path:
    """The folder with node.toml, the service files, agents and example tasks: conf/ of the checkout."""
    return Path(__file__).with_name("conf")


def install_command(extra: str = "", python: str | None = None) -> str:
    """A shell command that installs this distribution with an extra, from where this copy came from.

    Args:
        extra: `training`, or several as `training,rag`; empty: the base.
        python: the interpreter to install into; None: this one.
    """
    return f"{shlex.quote(python or sys.executable)} -m pip install {_requirement(f'[{extra}]' if extra else '')}"


def _requirement(extra: str) -> str:
    from urllib.parse import unquote, urlsplit

    source = _direct_url()
    named = shlex.quote(f"{DISTRIBUTION}{extra}") if extra else DISTRIBUTION
    if source is None:
        return named
    url = str(source.get("url", ""))
    if vcs := source.get("vcs_info"):
        at = f"@{vcs['commit_id']}" if vcs.get("commit_id") else ""
        return shlex.quote(f"{DISTRIBUTION}{extra} @ {vcs.get('vcs', 'git')}+{url}{at}")
    parts = urlsplit(url)
    if parts.scheme != "file":
        return shlex.quote(f"{DISTRIBUTION}{extra} @ {url}")
    path = Path(unquote(parts.path))
    if not path.exists():  # the wheel was removed after its installation
        return named
    flag = "-e " if source.get("dir_info", {}).get("editable") else ""
    return flag + shlex.quote(f"{path}{extra}")


def _direct_url() -> dict[str, Any] | None:
    """direct_url.json (PEP 610): what pip was given, if that was not a name in an index."""
    import json
    from importlib import metadata

    for each in metadata.distributions(name=DISTRIBUTION):  # a checkout has one more, in its own folder
        text = each.read_text("direct_url.json")
        if text is not None:
            try:
                found = json.loads(text)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def other_owners() -> list[str]:
    """Other distributions in this environment that have files of the package `flowmesh`, or a command of that name.

    Reads the lists of files of all distributions: tenths of a second in a large environment.
    """
    from importlib import metadata

    found = set()
    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name is None or name.lower().replace("_", "-") == DISTRIBUTION:
            continue
        commands = {entry.name for entry in each.entry_points if entry.group == "console_scripts"}
        if PACKAGE in commands or any(file.parts[0] == PACKAGE for file in each.files or () if file.parts):
            found.add(name)
    return sorted(found)


def problem() -> str:
    """What another distribution has done to this one's files, with the remedy; empty if nothing.

    Looks at `flowmesh/__init__.py` only, which is quick.
    """
    if getattr(sys.modules[PACKAGE], "DISTRIBUTION", None) == DISTRIBUTION:
        return ""
    again = install_command().replace("pip install", "pip install --force-reinstall --no-deps")
    return (
        f"another distribution has overwritten or removed files of {DISTRIBUTION} (package {PACKAGE!r}); "
        f"uninstall it, then: {again}"
    )
