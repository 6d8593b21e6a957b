"""Reads a pipeline's document: its stages with what each inherits, `foreach` expanded, and what each waits for.

All that is wrong with it is in one error.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.errors import FieldError
from flowmesh.pipelines import references
from flowmesh.pipelines.conditions import Condition, ConditionError, equal
from flowmesh.pipelines.entries import Entry, all_names, is_pipeline, read_entries
from flowmesh.pipelines.fields import MAX_STAGES, Parallel
from flowmesh.pipelines.fields import Condition as FieldCondition
from flowmesh.pipelines.graph import cycle
from flowmesh.pipelines.instances import Instances, instances_of, source_of
from flowmesh.pipelines.uses import used_by
from flowmesh.validation.convert import joined
from flowmesh.validation.describe import nearest
from flowmesh.validation.json_paths import PathError

__all__ = ["Pipeline", "Stage", "is_pipeline", "read"]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage, or one of those that a `foreach` stands for."""

    name: str
    """Of a `foreach`: its stage's name, a dot and a number."""
    entry: Entry
    spec: dict[str, Any]
    """With what it inherits; references to stages are still in it."""
    depends_on: tuple[str, ...]
    """Names of stages: those it names, and those whose results it uses."""
    each: dict[str, Any] | None = None
    """Its values of `foreach`."""
    aliases: dict[str, str] = {}
    """By the name of a `foreach` with the same values: the stage that goes with this one."""

    @property
    def group(self) -> str:
        """Its name in the document."""
        return self.entry.name

    @property
    def when(self) -> bool | str | None:
        return self.entry.fields.when

    @property
    def condition(self) -> FieldCondition | None:
        return self.entry.fields.condition

    @property
    def parallel(self) -> Parallel | None:
        """None: it is not divided."""
        parallel = self.entry.fields.parallel
        return parallel if parallel is not None and parallel.enabled else None

    @property
    def merges(self) -> bool:
        return self.entry.fields.merge is not False


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A document of several stages, in the document's order."""

    head: dict[str, Any]
    """The document's other fields, such as `apiVersion` and `metadata`."""
    stages: tuple[Stage, ...]
    groups: dict[str, tuple[str, ...]]
    """By name in the document: the names of its stages. More than one, or another name, where it has `foreach`."""

    @property
    def edges(self) -> dict[str, tuple[str, ...]]:
        return {stage.name: stage.depends_on for stage in self.stages}

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a reference may begin with."""
        return tuple(dict.fromkeys([*self.groups, *(stage.name for stage in self.stages)]))


def read(document: dict[str, Any]) -> Pipeline:
    """Read a document for which `is_pipeline` is true.

    Raises:
        FieldError: names all that is wrong with it.
    """
    faults: list[str] = []
    listed, chain = read_entries(document["spec"], faults)
    faults += _twice(listed)
    entries = list({entry.name: entry for entry in reversed(listed)}.values())[::-1]
    instances = instances_of(entries, faults)
    groups = {entry.name: tuple(name for name, _ in instances[entry.name]) for entry in entries}
    for name in groups:
        for other, names in groups.items():
            if other != name and name in names:
                faults.append(f"spec: {name!r} is a stage, and one of the foreach of {other!r}; rename one")
    stages: list[Stage] = []
    known = tuple(dict.fromkeys([*groups, *(one for group in groups.values() for one in group), *all_names(document)]))
    for index, entry in enumerate(entries):
        before = entries[index - 1].name if chain and index else None
        stages += _stages(entry, before, entries, instances, known, faults)
    if len(stages) > MAX_STAGES:
        faults.append(f"spec: {len(stages)} stages; a pipeline has at most {MAX_STAGES}")
    if ring := cycle({stage.name: stage.depends_on for stage in stages}):
        where = next(stage.entry.where for stage in stages if stage.name == ring[0])
        faults.append(f"{where}: stages wait for each other: {' -> '.join(ring)}")
    if faults:
        raise _refusal(faults)
    head = {key: value for key, value in document.items() if key not in ("spec", "merge_children")}
    return Pipeline(head=head, stages=tuple(stages), groups=groups)


def _refusal(faults: list[str]) -> FieldError:
    every = list(dict.fromkeys(faults))
    return FieldError(joined(every), "spec", tuple(every))


def _twice(entries: list[Entry]) -> list[str]:
    seen: dict[str, str] = {}
    faults = []
    for entry in entries:
        if entry.name in seen:
            faults.append(f"{entry.where}.name: {entry.name!r} is also the name of {seen[entry.name]}; rename one")
        elif entry.name == references.EACH:
            faults.append(f"{entry.where}.name: {entry.name!r} stands for the values of foreach; use another name")
        seen.setdefault(entry.name, entry.where)
    return faults


def _stages(  # noqa: PLR0917
    entry: Entry,
    before: str | None,
    entries: list[Entry],
    instances: dict[str, Instances],
    names: tuple[str, ...],
    faults: list[str],
) -> list[Stage]:
    """The stages of one entry.

    Args:
        before: the entry that it waits for where it does not say.
        names: those that a reference may begin with.
    """
    groups = {name: tuple(one for one, _ in listed) for name, listed in instances.items()}
    by_name = {other.name: other for other in entries}
    source = source_of(entry, by_name)
    siblings = [other.name for other in entries if other is not entry and source_of(other, by_name) is source]
    given = entry.fields.dependsOn
    for index, other in enumerate(given or ()):
        if other not in names:
            faults.append(f"{entry.where}.dependsOn[{index}]: there is no stage {other!r}; {nearest(other, names)}")
        elif other == entry.name:
            faults.append(f"{entry.where}.dependsOn[{index}]: a stage cannot wait for itself")
    stages = []
    for number, (name, each) in enumerate(instances[entry.name]):
        aliases = {other: groups[other][number] for other in siblings if each is not None}
        spec = _with_each(entry, each, faults)
        wanted = list(given) if given is not None else [before] if before is not None else []
        wanted += used_by(entry, spec, names, faults)
        depends_on = [
            one
            for other in wanted
            for one in ((aliases[other],) if other in aliases else groups.get(other, (other,)))
            if other in names
        ]
        depends = tuple(dict.fromkeys(depends_on))
        stages.append(Stage(name=name, entry=entry, spec=spec, depends_on=depends, each=each, aliases=aliases))
    return stages


def _with_each(entry: Entry, each: dict[str, Any] | None, faults: list[str]) -> dict[str, Any]:
    if each is None:
        return entry.spec

    def resolve(expr: str) -> Any:
        return references.each_value(expr, each)

    try:
        # `$${` stays as it is: the stage's references are resolved later.
        replaced: dict[str, Any] = references.replace(entry.spec, resolve, place=entry.place, keep_escapes=True)
    except FieldError as error:
        faults.append(str(error))
        return entry.spec
    return replaced


def holds(stage: Stage, results: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a stage's conditions let it run.

    Args:
        results: by stage that has one.

    Raises:
        FieldError: a condition has no answer.
    """
    field = stage.condition
    if field is not None:
        reference = references.Reference(field.node, field.field, f"{field.node}.{field.field}")
        try:
            if not equal(references.value_at(reference, results), field.equals):
                return False
        except (PathError, ConditionError) as error:
            raise FieldError(f"{stage.entry.where}.condition: {error}", stage.entry.where) from None
    when = stage.when
    if not isinstance(when, str):
        return when is not False

    def resolve(expr: str) -> Any:
        found = references.split(expr, names)
        if found is not None:
            return references.value_at(found, results)
        return references.each_value(expr, stage.each or {})

    try:
        return Condition(when).holds(resolve)
    except (PathError, ConditionError) as error:
        raise FieldError(f"{stage.entry.where}.when: {error}", stage.entry.where) from None
