"""`flowmesh init`: writes a node's files, makes its user and folders, and says what to do next.

What is there already is left as it is: a second run changes nothing.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import click

from flowmesh.cli import doctor, init_files
from flowmesh.cli.findings import show
from flowmesh.cli.init_files import Place
from flowmesh.errors import EXIT_OK, ConfigError, UnavailableError

UNITS = {"systemd": "systemd/system/flowmesh-supervisor.service", "supervisord": "supervisor/conf.d/flowmesh.conf"}
"""Below /etc."""


@click.command(
    help="Set up a node on this machine: settings, secrets file, service file, user and folders. "
    "Existing files are kept. Ends with the findings of `flowmesh doctor` and what to do next."
)
@click.option(
    "--prefix",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Put everything in this folder. Without it: /etc and /var/lib, as root.",
)
@click.option("--systemd", "manager", flag_value="systemd", help="Write a systemd unit (default where systemd runs).")
@click.option("--supervisord", "manager", flag_value="supervisord", help="Write a section for supervisord.")
@click.option(
    "--user", metavar="NAME", help="User that tasks run as, made if it is missing. Default: flowmesh. Needs root."
)
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
def init(prefix: str | None, manager: str | None, user: str | None, dry_run: bool) -> int:
    """Run the command; returns the exit code."""
    place = _place(prefix, user)
    if manager is None and (Path("/run/systemd/system").is_dir() or prefix is None):
        manager = "systemd"
    steps = Steps(dry_run=dry_run)
    if place.task_user is not None:
        steps.user(place.task_user, place.home)
    for folder, mode in ((place.config_dir, 0o755), (place.state_dir, 0o711), (place.results_dir, 0o755)):
        steps.folder(folder, mode)
    steps.file(place.node_toml, lambda: init_files.node_toml(place), 0o644)
    steps.file(place.node_env, lambda: init_files.ENVIRONMENT, 0o600)
    unit = None
    if manager is not None:
        unit = place.unit_dir / (UNITS[manager] if prefix is None else Path(UNITS[manager]).name)
        make = init_files.systemd_unit if manager == "systemd" else init_files.supervisord_section
        steps.file(unit, lambda: make(place), 0o644)
    if not dry_run:
        click.echo()
        show(doctor.examine(str(place.node_toml)))
    _next(place, manager, unit, dry_run=dry_run)
    return EXIT_OK


def _place(prefix: str | None, user: str | None) -> Place:
    if prefix is not None:
        if user is not None:
            raise click.UsageError("--user: only a node of the whole machine has a user for tasks; leave out --prefix")
        return init_files.below(Path(prefix).expanduser().absolute(), pwd.getpwuid(os.geteuid()).pw_name)
    if os.geteuid() != 0:
        raise ConfigError(
            "a node of the whole machine is set up by root: use sudo, or --prefix DIR for one of your own user"
        )
    return init_files.system(user or "flowmesh")


class Steps:
    """Does each step unless that was done before, and prints one line for it.

    Args:
        dry_run: only print.
    """

    def __init__(self, *, dry_run: bool) -> None:
        self._dry_run = dry_run

    def user(self, name: str, home: Path) -> None:
        """
        Raises:
            UnavailableError: the user cannot be made.
        """
        command = ["useradd", "--system", "--home-dir", str(home), "--shell", "/usr/sbin/nologin", name]
        try:
            pwd.getpwnam(name)
            self._say("kept", f"user {name}")
            return
        except KeyError:
            self._say("made", f"user {name}: {' '.join(command)}")
        if self._dry_run:
            return
        if shutil.which(command[0]) is None:
            raise UnavailableError(f"useradd is missing: make the user {name} by hand, then run this again")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"the user {name} cannot be made: {done.stderr.strip()}")
        home.mkdir(parents=True, exist_ok=True)
        found = pwd.getpwnam(name)
        os.chown(home, found.pw_uid, found.pw_gid)
        home.chmod(0o700)

    def folder(self, path: Path, mode: int) -> None:
        if path.is_dir():
            self._say("kept", f"folder {path}")
            return
        self._say("made", f"folder {path}")
        if not self._dry_run:
            _writable(lambda: path.mkdir(parents=True, mode=mode), path)

    def file(self, path: Path, content: Callable[[], str], mode: int) -> None:
        text = content()
        if path.exists():
            same = path.stat().st_size == len(text.encode()) and path.read_text() == text
            self._say("kept", f"{path}" if same else f"{path} (differs from what this version would write)")
            return
        self._say("made", f"{path} ({mode:04o})")
        if not self._dry_run:
            _writable(lambda: _write(path, text, mode), path)

    def _say(self, what: str, text: str) -> None:
        what = {"made": "would make"}.get(what, what) if self._dry_run else what
        click.echo(f"{what:<5} {text}")


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)


def _writable(act: Callable[[], object], path: Path) -> None:
    try:
        act()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}; use another --prefix, or sudo") from None


def _next(place: Place, manager: str | None, unit: Path | None, *, dry_run: bool) -> None:
    start = {
        "systemd": "systemctl daemon-reload && systemctl enable --now flowmesh-supervisor",
        "supervisord": "supervisorctl update",
    }
    lines = [f"set REDIS_URL in {place.node_env}, and what you need in {place.node_toml}"]
    if unit is not None and manager is not None:
        if place.unit_dir != Path("/etc"):
            lines.append(f"as root: cp {unit} /etc/{UNITS[manager]}")
        lines.append(start[manager])
    else:
        lines.append(f"set -a; . {place.node_env}; {init_files.program()} --config {place.node_toml}")
    lines.append(f"flowmesh-node status --config {place.node_toml}")
    click.echo("\nnext" + (", after a run without --dry-run" if dry_run else "") + ":")
    for number, line in enumerate(lines, 1):
        click.echo(f"  {number}. {line}")
