"""What a jail is asked to do: its one argument, a JSON object that `sandbox.py` makes, checked field by field."""

from __future__ import annotations

import json
import resource
from typing import Any, NamedTuple

MODES = ("namespaces", "landlock")
_MOST = 2**62
"""Of any number: the kernel's limits are 64-bit and signed in places."""


class PlanRefused(Exception):
    """The plan is not one that can be carried out. Names the field."""


class Plan(NamedTuple):
    """One command's jail."""

    mode: str
    network: bool
    root: str
    """An empty folder, in which the new root is mounted."""
    work_dir: str
    readable: tuple[str, ...]
    env: dict[str, str]
    tasks: int
    """Most processes and threads."""
    tasks_of_user: int
    """How many the user has already."""
    disk_bytes: int
    """Size of the file system in memory that holds the work folder, /tmp and /dev/shm."""
    in_memory: bool
    """Whether the work folder is in it, too, and copied back at the end."""
    limits: dict[str, int]
    """By name of the resource, as in `resource`."""
    cgroups: tuple[str, ...]
    """Folders of cgroups to join."""
    report: int
    """Descriptor for the report; -1: none."""


def parse(text: str) -> Plan:
    """
    Raises:
        PlanRefused: naming the field.
    """
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlanRefused(f"the plan is not JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != set(Plan._fields):
        raise PlanRefused(f"the plan has to be an object with exactly the fields {', '.join(Plan._fields)}")
    plan = Plan(
        mode=found["mode"],
        network=_flag(found, "network"),
        root=_path(found["root"], "root"),
        work_dir=_path(found["work_dir"], "work_dir"),
        readable=tuple(_path(each, "readable") for each in _list(found, "readable")),
        env=_env(found["env"]),
        tasks=_number(found["tasks"], "tasks", 1),
        tasks_of_user=_number(found["tasks_of_user"], "tasks_of_user", 0),
        disk_bytes=_number(found["disk_bytes"], "disk_bytes", 1),
        in_memory=_flag(found, "in_memory"),
        limits=_limits(found["limits"]),
        cgroups=tuple(_path(each, "cgroups") for each in _list(found, "cgroups")),
        report=_number(found["report"], "report", -1),
    )
    if plan.mode not in MODES:
        raise PlanRefused(f"mode: expected one of {', '.join(MODES)}")
    return plan


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _flag(found: dict[str, Any], name: str) -> bool:
    value = found[name]
    if not isinstance(value, bool):
        raise PlanRefused(f"{name}: expected true or false")
    return value


def _list(found: dict[str, Any], name: str) -> list[Any]:
    value = found[name]
    if not isinstance(value, list):
        raise PlanRefused(f"{name}: expected a list")
    return value


def _number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise PlanRefused(f"{name}: expected a whole number from {least} on")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise PlanRefused(f"{name}: expected texts without a zero byte")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise PlanRefused(f"{name}: has a character that no file name can have") from None
    return value


def _path(value: Any, name: str) -> str:
    """An absolute path, without anything that leads upwards: it is also used below the new root."""
    path = _text(value, name)
    parts = path.split("/")[1:]
    if not path.startswith("/") or path.startswith("//") or not parts[0] or ".." in parts:
        raise PlanRefused(f"{name}: expected absolute paths without '..'")
    return path


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise PlanRefused("env: expected an object of texts")
    env = {_text(name, "env"): _text(each, "env") for name, each in value.items()}
    if any(not name or "=" in name for name in env):
        raise PlanRefused("env: a variable has no name, or one with '='")
    return env


def _limits(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not all(
        name.startswith("RLIMIT_") and isinstance(getattr(resource, name, None), int) for name in value
    ):
        raise PlanRefused("limits: expected an object of resource limits")
    return {name: _number(each, f"limits.{name}", 0) for name, each in value.items()}
