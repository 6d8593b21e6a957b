"""Who this node is: ids that its journal keeps, as long as the state folder is where they were made.

A copy of a state folder, or of a machine, is another node. Under the same ids it would take the original's tasks a
second time, and on the same host end the original's processes.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh.tasks.journal import Journal

_MACHINE_ID = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a state folder is."""

    machine: str
    boot: str
    pid_namespace: int
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path) -> Place:
        status = folder.stat()
        return cls(
            machine=next((text for path in _MACHINE_ID if (text := _read(path))), ""),
            boot=_read(_BOOT_ID),
            pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
            device=status.st_dev,
            inode=status.st_ino,
        )

    def is_same(self, other: Place) -> bool:
        """Whether both are one folder. Device numbers may change with a boot, and with a container's start."""
        if (self.machine, self.inode) != (other.machine, other.inode):
            return False
        one_boot = (self.boot, self.pid_namespace) == (other.boot, other.pid_namespace)
        return not one_boot or self.device == other.device

    @property
    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


class NodeIds(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is called."""

    node_id: str
    """Names cgroups and marks processes; of this folder only."""
    worker_id: str
    owner: str
    """Written into the registration in Redis: the folder's secret name, and its place in this boot."""


def settle(journal: Journal, folder: Path, worker_id: str | None) -> NodeIds:
    """The ids of the node whose state folder this is; new ones where the folder was copied from another place.

    A copy leaves the original's tasks, events and sockets alone: nothing of them is its own.

    Args:
        journal: of that folder, which is locked.
        worker_id: the configured one; None: the journal's.
    """
    here = Place.of(folder)
    kept = journal.fact("place", msgspec.json.encode(here).decode())
    if not _is_same(kept, here):
        left = journal.disown("node_id", "worker_id", "owner")
        for path in (folder / "run").glob("*.sock"):
            path.unlink(missing_ok=True)
        logger.bind(tasks=left).warning(
            "the state folder is a copy of another one: new ids; the other node's open tasks and events stay its own"
        )
    journal.set_fact("place", msgspec.json.encode(here).decode())
    token = journal.fact("owner", secrets.token_hex(8))
    return NodeIds(
        node_id=journal.fact("node_id", secrets.token_hex(4)),
        worker_id=worker_id or journal.fact("worker_id", f"worker-{secrets.token_hex(6)}"),
        owner=f"{token}:{here.digest}",
    )


def _is_same(kept: str, here: Place) -> bool:
    try:
        return msgspec.json.decode(kept, type=Place).is_same(here)
    except msgspec.DecodeError:  # of a newer version
        return True


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
