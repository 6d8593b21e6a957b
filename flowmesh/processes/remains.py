"""Ends what is left of a child whose fork server is dead. Blocks; called in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flowmesh.processes import tree
from flowmesh.processes.cgroup import Leaf


def end_remains(
    mark: str, pid: int | None, leaves: Sequence[Leaf] = (), dead_server: str | None = None, limit_s: float = 5.0
) -> int:
    """Kill every process left of an attempt.

    They are found by cgroup, by session, by FLOWMESH_ATTEMPT in their environment, and by the dead server's command
    line, which its forks still show.

    Args:
        mark: the attempt's FLOWMESH_ATTEMPT.
        pid: its first process, where known.
        limit_s: gives up after that.

    Returns:
        how many processes were killed.
    """

    def there() -> set[int]:
        found = set(tree.marked("FLOWMESH_ATTEMPT", mark))
        if pid is not None:
            found.update(tree.in_session(pid))
        if dead_server is not None:
            found.update(tree.forked_from(dead_server))
        return found

    return _end(there, leaves, limit_s)


def end_leaves(leaves: Sequence[Leaf], limit_s: float = 5.0) -> int:
    """Kill every process in these cgroups and remove them; returns how many processes were killed."""
    return _end(set, leaves, limit_s)


def _end(there: Callable[[], set[int]], leaves: Sequence[Leaf], limit_s: float) -> int:
    seen: set[int] = set()
    deadline = time.monotonic() + limit_s
    while True:
        found = there()
        for leaf in leaves:
            found.update(leaf.pids())
            leaf.kill()
        tree.kill_all(found)
        seen |= found
        removed = [leaf.remove() for leaf in leaves] if not found else [False]
        if all(removed) or time.monotonic() > deadline:
            return len(seen)
        time.sleep(0.01)
