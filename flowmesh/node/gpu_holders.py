"""Names the processes that hold a GPU: user and command, as far as /proc shows them."""

from __future__ import annotations

import asyncio
import pwd
from collections.abc import Collection, Sequence

import msgspec
import psutil

from flowmesh.node.devices import GpuProcess

_LOOKUP_TIMEOUT_S = 2.0
_COMMAND_SHOWN = 200


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a GPU. None: not known."""

    pid: int
    user: str | None
    command: str | None
    used_bytes: int | None
    ours: bool
    """Whether it belongs to the task."""

    def __str__(self) -> str:
        size = "" if self.used_bytes is None else f" {self.used_bytes / (1 << 20):.0f} MiB"
        who = f"user {self.user}, {self.command}" if self.command else "not in /proc: in another PID namespace?"
        return f"pid {self.pid} ({who}){size}"


async def name_holders(processes: Sequence[GpuProcess], own_pids: Collection[int] = ()) -> tuple[Holder, ...]:
    """Who these processes are. A user name may need the network (LDAP), so a thread looks it up, within a timeout.

    Args:
        own_pids: the processes of the task.
    """
    if not processes:
        return ()
    own = frozenset(own_pids)
    try:
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            people = await asyncio.to_thread(lambda: [_user_and_command(process.pid) for process in processes])
    except TimeoutError:
        people = [(None, None)] * len(processes)
    return tuple(
        Holder(pid=process.pid, user=user, command=command, used_bytes=process.used_bytes, ours=process.pid in own)
        for process, (user, command) in zip(processes, people, strict=True)
    )


def _user_and_command(pid: int) -> tuple[str | None, str | None]:
    try:
        process = psutil.Process(pid)
        uid = process.uids().real
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return None, None
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return user, command[:_COMMAND_SHOWN]
