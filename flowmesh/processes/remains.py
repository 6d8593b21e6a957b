"""Kills the processes that are left of a child whose fork server is dead. Blocks; called in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from loguru import logger

from flowmesh.processes import tree
from flowmesh.processes.cgroup import Leaf


def end_remains(
    mark: str, pid: int | None, leaves: Sequence[Leaf] = (), dead_server: str | None = None, limit_s: float = 5.0
) -> int:
    """Kill every process that is left of an attempt, and remove its cgroups.

    The processes are found by cgroup, by session, by FLOWMESH_ATTEMPT in their environment, and by the command line of
    the dead server, which its forks keep until they execute a program.

    Args:
        mark: the attempt's FLOWMESH_ATTEMPT.
        pid: the attempt's first process, if known.
        leaves: its cgroups, or those of all children of the server.
        dead_server: its fork server's id, if known.
        limit_s: give up after so many seconds.

    Returns:
        how many processes were killed.
    """

    def find() -> set[int]:
        found = set(tree.marked("FLOWMESH_ATTEMPT", mark))
        if pid is not None:
            found.update(tree.in_session(pid))
        if dead_server is not None:
            found.update(tree.forked_from(dead_server))
        return found

    return _end(find, leaves, limit_s)


def end_leaves(leaves: Sequence[Leaf], limit_s: float = 5.0) -> int:
    """Kill every process in these cgroups, and remove the cgroups.

    Args:
        limit_s: give up after so many seconds.

    Returns:
        how many processes were killed.
    """
    return _end(set, leaves, limit_s)


def _end(find: Callable[[], set[int]], leaves: Sequence[Leaf], limit_s: float) -> int:
    seen: set[int] = set()
    deadline = time.monotonic() + limit_s
    while True:
        found, trouble = find(), ""
        for leaf in leaves:
            found.update(leaf.pids())
            try:
                leaf.kill()
            except OSError as error:  # its processes are killed one by one
                trouble = f"{error}"
        tree.kill_all(found)
        seen |= found
        left = list(leaves)
        if not found:
            left = []
            for leaf in leaves:
                try:
                    removed = leaf.remove()
                except OSError as error:
                    removed, trouble = False, f"{error}"
                if not removed:
                    left.append(leaf)
            if not left:
                return len(seen)
        if time.monotonic() > deadline:
            names = ", ".join(leaf.path.name for leaf in left)
            logger.warning("left after {} s: cgroups {}: {}", limit_s, names or "none", trouble or f"pids {found}")
            return len(seen)
        time.sleep(0.01)
