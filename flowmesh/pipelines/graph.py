"""Which stage waits for which: cycles, order, and what lies behind a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Edges = Mapping[str, Sequence[str]]
"""By stage: those it depends on."""


def cycle(edges: Edges) -> list[str]:
    """The stages of one cycle, each depending on the next, the first one again at the end; empty if there is none."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        on_path: set[str] = set()
        stack = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                path.pop()
                on_path.discard(name)
                done.add(name)
            elif name in on_path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                on_path.add(name)
                stack.append((name, True))
                stack += [(each, False) for each in edges.get(name, ())]
    return []


def behind(edges: Edges, name: str) -> set[str]:
    """All stages that `name` depends on, also through others."""
    found: set[str] = set()
    waiting = list(edges.get(name, ()))
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += edges.get(each, ())
    return found


def depths(edges: Edges) -> dict[str, int]:
    """By stage: the length of the longest chain behind it. There must be no cycle."""
    found: dict[str, int] = {}
    stack = [(name, False) for name in reversed(list(edges))]
    while stack:
        name, ready = stack.pop()
        if name in found:
            continue
        if ready:
            found[name] = 1 + max((found[each] for each in edges[name]), default=-1)
        else:
            stack.append((name, True))
            stack += [(each, False) for each in edges[name]]
    return found
