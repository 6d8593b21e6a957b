"""The node's folders, and where each attempt's files lie in them."""

from __future__ import annotations

import functools
import os
import pwd
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.errors import ConfigError
from flowmesh.messages.gateway import Gateway
from flowmesh.messages.job import Permits
from flowmesh.redaction import Redactor
from flowmesh.settings.schema import ProcessesSettings

PARTS = ("run", "log", "spool", "tmp", "cache")
"""The folders inside the state folder."""
BASELINE_FILE = "gpus.json"
"""In an attempt's spool folder: the baselines of the attempt's GPUs, for a supervisor that adopts the task."""
OOM_SCORE_ADJ = 500
"""The kernel kills a task for memory before it kills the node."""


class Owner(msgspec.Struct, frozen=True):
    """The user that tasks run as."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @classmethod
    def named(cls, name: str) -> Owner:
        """Look the user up.

        Raises:
            ConfigError: there is none, or we may not become it.
        """
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(f"processes.task_user: there is no user {name!r} on this machine") from None
        if os.geteuid() not in (0, found.pw_uid):
            raise ConfigError(f"processes.task_user: only root can run tasks as {name!r}; leave it out, or run as root")
        groups = tuple(os.getgrouplist(name, found.pw_gid))
        return cls(found.pw_uid, found.pw_gid, groups, name, found.pw_dir)


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The node's folders."""

    state_dir: Path
    results_dir: Path
    work_dir: Path
    """Where tasks start: relative paths in their documents are relative to it."""
    mark: str
    """This node's part of FLOWMESH_ATTEMPT, which everything that its tasks execute has in its environment."""
    base_env: dict[str, str]
    cgroup: Path | None
    processes: ProcessesSettings
    limits: dict[str, Any] = {}
    """The [runners] settings: limits that runners obey."""
    permits: Permits = Permits()
    """What the operator allows documents to do."""
    owner: Owner | None = None
    """The user that tasks run as; None: the node's own user."""
    secrets: Redactor = Redactor()
    """Knows the node's own."""
    gateway: Gateway | None = None
    """Fetches with the node's token; None: the node has none, or no orchestrator."""
    traces: bool = False
    """Whether the node sends spans of its tasks."""
    umask: int | None = None
    """Of everything that writes results; None: that of the fork server."""

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "log"

    @property
    def cache_dir(self) -> Path:
        return self.state_dir / "cache"

    def spool(self, attempt: int) -> Path:
        """The folder through which the node and the attempt's children pass files."""
        return _part(self.state_dir, "spool", attempt)

    def tmp(self, attempt: int) -> Path:
        """The attempt's TMPDIR. Short: sockets are made below it, and their paths are bounded."""
        return _part(self.state_dir, "tmp", attempt)

    def mark_of(self, attempt: int) -> str:
        """The attempt's FLOWMESH_ATTEMPT."""
        return f"{self.mark}:{attempt}"

    @property
    def task_uid(self) -> int:
        """The user that tasks run as."""
        return os.geteuid() if self.owner is None else self.owner.uid

    @property
    def task_env(self) -> dict[str, str]:
        """What tasks see of the node's environment, with the home and name of the user that they run as."""
        if self.owner is None:
            return self.base_env
        return {**self.base_env, "HOME": self.owner.home, "USER": self.owner.name, "LOGNAME": self.owner.name}

    def make_parts(self) -> None:
        """Make the folders inside the state folder that are missing.

        Raises:
            OSError: one cannot be made, or is no folder.
        """
        make_parts(self.state_dir, self.owner)

    def give(self, folder: Path | int) -> None:
        """Make a folder the task user's; does nothing if tasks run as the node's user.

        Args:
            folder: a path that no task could have replaced, or a descriptor.
        """
        if self.owner is not None:
            os.chown(folder, self.owner.uid, self.owner.gid)


@functools.lru_cache(maxsize=256)
def _part(folder: Path, name: str, attempt: int) -> Path:
    """Asked for several times for each task; to parse a path takes longer than most of what is done with it."""
    return folder / name / str(attempt)


def make_parts(folder: Path, owner: Owner | None) -> None:
    """Make what is missing of the state folder's parts. A task user may enter those that its tasks need, and list none.

    Args:
        owner: the user that tasks run as; None: the node's own user.

    Raises:
        OSError: one cannot be made, or is no folder.
    """
    for name in PARTS:
        part = folder / name
        part.mkdir(exist_ok=True, mode=0o700)
        if owner is None:
            continue
        if name in ("spool", "tmp"):
            part.chmod(0o711)
        elif name == "cache":
            os.chown(part, owner.uid, owner.gid)
    if owner is not None:
        folder.chmod(0o711)
