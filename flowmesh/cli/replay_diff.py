"""Where two runs of one task differ: verdict, outputs, numbers within a tolerance, versions; timings side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from flowmesh.cli.render import seconds, shorten
from flowmesh.tasks.history import Found

TOLERANCE = 1e-3
"""Relative, of numbers such as losses: kernels add in another order each time."""
_NOT_COMPARED = re.compile(
    r"(?i)(^|[._])(\w*_s|\w*sec|\w*seconds|latency\w*|runtime\w*|\w*time|\w*per_second|\w*_path|export\.path|\w*dir|energy\w*"
    r"|\w*joules|peak_\w*|log_tail|\w*url|created\w*|\w*_at|resources|phases|cost\w*|command|versions|\w*_rss\w*|\w*memory\w*)$"
)
"""Fields that no two runs have alike."""
_SHOWN = 60


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A value that is not the same in both runs. None: it is missing there."""

    field: str
    before: Any = None
    now: Any = None

    def __str__(self) -> str:
        return f"{self.field}: {shorten(self.before, _SHOWN)} -> {shorten(self.now, _SHOWN)}"


def differences(before: Any, now: Any, field: str = "") -> Iterator[Difference]:
    """The values of two results that differ, in the order of the first; those that no two runs share are left out."""
    if field and _NOT_COMPARED.search(field):
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from differences(before.get(name), now.get(name), f"{field}.{name}" if field else str(name))
    elif isinstance(before, list) and isinstance(now, list):
        for index in range(max(len(before), len(now))):
            old, new = (part[index] if index < len(part) else None for part in (before, now))
            yield from differences(old, new, f"{field}[{index}]")
    elif not _alike(before, now):
        yield Difference(field=field, before=before, now=now)


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A result in which texts have other names: of the second run's task and folder those of the first.

    Args:
        names: what to replace, in this order, and by what.
    """
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(old, new) if old else value
        return value
    if isinstance(value, list):
        return [renamed(each, names) for each in value]
    if isinstance(value, dict):
        return {name: renamed(each, names) for name, each in value.items()}
    return value


def _alike(before: Any, now: Any) -> bool:
    numbers = [each for each in (before, now) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) == 2:
        return math.isclose(before, now, rel_tol=TOLERANCE, abs_tol=1e-9)
    return bool(before == now)


def in_mapping(before: Mapping[str, str], now: Mapping[str, str]) -> list[Difference]:
    """Where two mappings of names to texts differ, by the names that both have: a run that ends early imports less."""
    return [
        Difference(field=name, before=old, now=now[name])
        for name, old in before.items()
        if name in now and old != now[name]
    ]


def items_of(found: list[Difference]) -> list[str]:
    """The items that differ, each once: `items[3]` of `items[3].output`."""
    matches = (re.match(r"(?:\w+\.)*\w+\[\d+\]", each.field) for each in found)
    return list(dict.fromkeys(match[0] for match in matches if match))


def timings(before: Found, now: Found) -> list[tuple[str, float | None, float | None]]:
    """Seconds of the whole run and of each phase: (name, before, now)."""
    phases = dict.fromkeys([*before.detail.phases, *now.detail.phases])
    rows = [(name, before.detail.phases.get(name), now.detail.phases.get(name)) for name in phases]
    return [("in all", before.entry.wall_s, now.entry.wall_s), *rows]


def lines(before: Found, now: Found, results: tuple[Any, Any], *, until: str | None) -> Iterator[str]:
    """What is printed.

    Args:
        results: the content of responses.json of both; None: there is none.
        until: the phase after which the second run was stopped.
    """
    old, new = before.entry, now.entry
    if until is None:
        same = old.verdict == new.verdict
        yield f"verdict   {old.verdict}, as before" if same else f"verdict   {old.verdict} -> {new.verdict}"
        if not same or old.message != new.message:
            yield from (
                f"          {name}: {each.message}" for name, each in (("before", old), ("now", new)) if each.message
            )
        yield from _outputs(results)
        if old.tokens != new.tokens:
            yield "tokens    " + " -> ".join("none" if each.tokens is None else str(each.tokens) for each in (old, new))
    else:
        yield f"stopped   after {until}; outputs are not compared"
    changed = (
        in_mapping(before.detail.versions, now.detail.versions)
        if before.detail.versions and now.detail.versions
        else []
    )
    yield from (f"version   {each}" for each in changed)
    names = [", ".join(sorted(each.detail.gpus.values())) or "none" for each in (before, now)]
    if names[0] != names[1]:
        yield f"GPUs      {names[0]} -> {names[1]}"
    yield f"{'time':<24}{'before':>10}{'now':>10}"
    for name, *both in timings(before, now):
        yield f"  {name:<22}" + "".join(f"{'-' if each is None else seconds(each):>10}" for each in both)


def _outputs(results: tuple[Any, Any]) -> Iterator[str]:
    if results[0] is None or results[1] is None:
        missing = [run for run, result in zip(("first", "second"), results, strict=True) if result is None]
        which = "neither run has a result" if len(missing) == 2 else f"the {missing[0]} run has no result"
        yield f"outputs   not compared: {which}"
        return
    found = list(differences(*results))
    if not found:
        yield "outputs   no difference"
        return
    if len(found) == 1:
        yield f"outputs   1 value differs: {found[0]}"
        return
    items = items_of(found)
    what = f"{len(items)} items differ" if len(items) > 1 else f"{len(found)} values differ"
    yield f"outputs   {what}; the first: {found[0]}"
    yield from (f"          {each}" for each in found[1:5])
