"""Which of three set-ups a node has: what separates its tasks from it, and from each other. See docs/security.md."""

from __future__ import annotations

import enum
import os
import pwd

import msgspec

from flowmesh.settings.schema import Settings


class SetUp(enum.StrEnum):
    TASK_USER = "task user"
    """Tasks run as a user that is not the node's: they cannot read its memory, files and secrets."""
    SHARED_USER = "shared user"
    """Tasks run as the node's own, ordinary user."""
    ROOT = "root"
    """Tasks run as root, and can do anything on this machine."""


class Trust(msgspec.Struct, frozen=True):
    set_up: SetUp
    text: str
    """One line for people."""
    remedy: str = ""
    """How to separate tasks from the node; empty if they are."""


def trust(settings: Settings, euid: int | None = None) -> Trust:
    """The set-up that these settings give a node.

    Args:
        euid: the user that the node runs as; None: this process's.
    """
    euid = os.geteuid() if euid is None else euid
    name = settings.processes.task_user
    if name is not None and _uid_of(name) not in (None, euid):
        return Trust(SetUp.TASK_USER, f"tasks run as {name}, apart from the node")
    if euid == 0:
        return Trust(
            SetUp.ROOT,
            "tasks run as root: each can read every secret and change this machine",
            "make a user for tasks (`flowmesh init` does), and set processes.task_user to it",
        )
    return Trust(
        SetUp.SHARED_USER,
        f"tasks run as the node's user {_name_of(euid)}: each can read what the node's files hold",
        "run the node as root with processes.task_user, as the unit of `flowmesh init` does",
    )


def _uid_of(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
