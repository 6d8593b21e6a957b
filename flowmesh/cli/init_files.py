"""The files of `flowmesh init`: the packaged ones, with the paths and users of this machine filled in."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec

from flowmesh import installed

ENVIRONMENT = """\
# Read by the service manager, not by the node's file: mode 0600. Every variable of docs/contract.md may stand here.
# redis://USER:PASSWORD@HOST:PORT/DB, or rediss:// for TLS.
REDIS_URL=redis://127.0.0.1:6379/0
#ORCHESTRATOR_BASE_URL=https://orchestrator.example
#ORCHESTRATOR_TOKEN=
"""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node's files lie, and which users it has."""

    config_dir: Path
    state_dir: Path
    results_dir: Path
    unit_dir: Path
    """Of the service file."""
    task_user: str | None
    """Tasks run as this user; the node is root. None: the node is an ordinary user."""
    node_user: str
    home: Path
    """Of the task user."""

    @property
    def node_toml(self) -> Path:
        return self.config_dir / "node.toml"

    @property
    def node_env(self) -> Path:
        return self.config_dir / "node.env"


def system(task_user: str) -> Place:
    """Of a node that the machine's service manager starts as root."""
    state = Path("/var/lib/flowmesh")
    return Place(
        config_dir=Path("/etc/flowmesh"),
        state_dir=state,
        results_dir=state / "results",
        unit_dir=Path("/etc"),
        task_user=task_user,
        node_user="root",
        home=state / "home",
    )


def below(prefix: Path, node_user: str) -> Place:
    """Of a node whose files all lie in one folder, and whose tasks run as its own user."""
    return Place(
        config_dir=prefix,
        state_dir=prefix / "state",
        results_dir=prefix / "results",
        unit_dir=prefix,
        task_user=None,
        node_user=node_user,
        home=prefix,
    )


def node_toml(place: Place) -> str:
    """The packaged node.toml with this node's folders and task user set. Its Redis comes from node.env."""
    text = (installed.conf() / "node.toml").read_text()
    text = _set(text, "results", "dir", str(place.results_dir))
    text = _set(text, "node", "state_dir", str(place.state_dir))
    if place.task_user is not None:
        text = _set(text, "processes", "task_user", place.task_user)
    return text


def _set(text: str, section: str, key: str, value: str) -> str:
    """Set a key that the file has as a comment."""
    line = re.compile(rf"(?ms)(^\[{section}\]$.*?)^#{key} = [^\n]*$")
    changed, count = line.subn(lambda match: f"{match[1]}{key} = {json.dumps(value)}", text, count=1)
    assert count == 1, f"node.toml has no line '#{key} = ' in [{section}]"
    return changed


def systemd_unit(place: Place) -> str:
    """The packaged unit for this interpreter, these folders and users."""
    text = (installed.conf() / "flowmesh-supervisor.service").read_text()
    text = _line(text, "EnvironmentFile", f"-{place.node_env}")
    text = _line(text, "ExecStart", f"{program()} --config {place.node_toml}")
    text = _line(text, "WorkingDirectory", str(place.state_dir))
    text = _line(text, "ReadWritePaths", f"-{place.state_dir} -{place.results_dir}")
    if place.task_user is None:
        text = text.replace("\nEnvironmentFile=", f"\nUser={place.node_user}\nEnvironmentFile=", 1)
        text = re.sub(r"(?m)^(StateDirectory|ProtectHome)=.*\n", "", text)  # its folders may lie in a home folder
    return text


def supervisord_section(place: Place) -> str:
    """The packaged section for this interpreter, these folders and users."""
    text = (installed.conf() / "supervisord.conf").read_text()
    text = _line(text, "command", f"{program()} --config {place.node_toml}")
    text = _line(text, "directory", str(place.state_dir))
    text = _line(text, "user", place.node_user)
    return _line(text, "environment", f'STATE_DIRECTORY="{place.state_dir}"')


def _line(text: str, key: str, value: str) -> str:
    changed, count = re.subn(rf"(?m)^{key}=.*$", lambda _: f"{key}={value}", text, count=1)
    assert count == 1, f"the packaged file has no line '{key}='"
    return changed


def program() -> str:
    """The command that starts a node of this installation."""
    script = Path(sys.executable).with_name("flowmesh-supervisor")
    return str(script) if script.exists() else f"{sys.executable} -m flowmesh.cli.supervisor"
