"""The entries of `spec.stages` and `spec.graph.nodes`: their own fields, and the outer spec that they inherit."""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.errors import FieldError
from flowmesh.pipelines.fields import ALIASES, OWN, Graph, StageFields
from flowmesh.validation.convert import convert
from flowmesh.validation.describe import Path, dotted, found, near
from flowmesh.validation.unused import BLOCKS, is_unused

_IN_SPEC = OWN - {"name"}
_INHERITED = ("parallel", "merge")
"""Fields of a stage that the outer spec may have for all of them."""
_MISSPELT = ("dependsOn", "dependencies", "foreach", "parallel", "condition")
"""Of a stage's own fields those that no field of a task resembles."""
_ONLY_IN_A_STAGE = ("when", "condition", "foreach")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A stage as the document has it."""

    fields: StageFields
    where: str
    """The path of its entry, such as `spec.stages[0]`."""
    own: dict[str, Any]
    """Its own spec."""
    inline: bool
    """Whether its spec is the entry itself, without a field `spec`."""
    spec: dict[str, Any]
    """With what it inherits."""

    @property
    def name(self) -> str:
        return self.fields.name

    def place(self, path: Path) -> str:
        """The dotted path in the document of a field of the stage's spec: its own, or the one that it inherits."""
        depth = _depth(self.own, path)
        if depth < _depth(self.spec, path):
            return dotted("spec", path)
        return dotted(self.where if self.inline else f"{self.where}.spec", path)


def is_pipeline(document: Any) -> bool:
    """Whether a task's document has several stages."""
    spec = document.get("spec") if isinstance(document, dict) else None
    return isinstance(spec, dict) and (spec.get("stages") is not None or spec.get("graph") is not None)


def read_entries(spec: dict[str, Any], faults: list[str]) -> tuple[list[Entry], bool]:
    """The stages of a pipeline's spec, and whether they are a chain. What is wrong with them is added to `faults`."""
    stages, graph = spec.get("stages"), spec.get("graph")
    if stages is not None and graph is not None:
        faults.append("spec.graph: spec.stages is there too; use one of them")
        return [], False
    outer = {name: value for name, value in spec.items() if name not in ("stages", "graph")}
    faults += [
        f"spec.{name}: belongs into a stage, not beside them"
        for name in _ONLY_IN_A_STAGE
        if outer.get(name) is not None
    ]
    if graph is not None:
        try:
            listed: list[Any] = list(convert(graph, Graph, where="spec.graph").nodes)
        except FieldError as error:
            faults += error.faults
            return [], False
        return _entries(listed, "spec.graph.nodes", outer, faults), False
    if not isinstance(stages, list) or not stages:
        faults.append(f"spec.stages: expected a list with at least one stage, found {found(stages)}")
        return [], True
    return _entries(stages, "spec.stages", outer, faults), True


def all_names(document: dict[str, Any]) -> list[str]:
    """The names of all entries, also of those with faults."""
    spec = document["spec"]
    graph = spec.get("graph")
    listed = spec.get("stages") or (graph.get("nodes") if isinstance(graph, dict) else None)
    found = [entry.get("name") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [name for name in found if isinstance(name, str)]


def _entries(listed: list[Any], where: str, outer: dict[str, Any], faults: list[str]) -> list[Entry]:
    entries = []
    for index, value in enumerate(listed):
        try:
            entries.append(_entry(value, f"{where}[{index}]", outer))
        except FieldError as error:
            faults += error.faults
    return entries


def _entry(value: Any, where: str, outer: dict[str, Any]) -> Entry:
    if not isinstance(value, dict):
        raise FieldError(f"{where}: expected a mapping with `name` and `spec`, found {found(value)}", where)
    value = _renamed(value, where)
    inline = value.get("spec") is None
    own: Any = {key: item for key, item in value.items() if key not in OWN} if inline else value["spec"]
    for_others = () if inline else (key for key in value if key not in BLOCKS and is_unused("", key, value[key]))
    value = {key: item for key, item in value.items() if key not in {*for_others} - OWN}
    fields = {key: item for key, item in value.items() if not inline or key in OWN} | ({} if inline else {"spec": {}})
    if not isinstance(own, dict):
        raise FieldError(f"{where}.spec: expected a mapping, found {found(own)}", where)
    if inline:
        own.pop("spec", None)
    inner = f"{where}.spec"
    own = _renamed(own, inner)
    faults: list[str] = []
    for name in own.keys() - _IN_SPEC:
        if meant := near(str(name), _MISSPELT):
            faults.append(f"{where if inline else inner}.{name}: unknown field; did you mean {meant!r}?")
    for name in _IN_SPEC & own.keys():
        if fields.get(name) is not None:
            faults.append(f"{inner}.{name}: {where}.{name} is there too; use one of them")
        fields[name] = own[name]
    for name in _INHERITED:
        if fields.get(name) is None and name in outer:
            fields[name] = outer[name]
    if faults:
        raise FieldError(faults[0], inner, tuple(faults))
    own = {key: item for key, item in own.items() if key not in _IN_SPEC}
    dropped = {*_IN_SPEC, *ALIASES}
    inherited = inherit({key: item for key, item in outer.items() if key not in dropped}, own)
    fields.pop("spec", None)
    return Entry(fields=convert(fields, StageFields, where=where), where=where, own=own, inline=inline, spec=inherited)


def _renamed(value: dict[str, Any], where: str) -> dict[str, Any]:
    """`value` with one spelling of each field, and one name of `dependsOn` as a list."""
    renamed = {}
    for key, item in value.items():
        name = ALIASES.get(key, key)
        if name in renamed:
            raise FieldError(f"{where}.{key}: the same field as {name}; use one of them", where)
        renamed[name] = [item] if name == "dependsOn" and isinstance(item, str) else item
    return renamed


def inherit(outer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A stage's spec: its own fields, and the outer spec's where it has none.

    Mappings are inherited field by field, except where their `type` differs. Anything else, lists too, is replaced.
    """
    merged = dict(outer)
    for name, value in own.items():
        before = outer.get(name)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("type", before.get("type")) == before.get("type")
        ):
            merged[name] = inherit(before, value)
        else:
            merged[name] = value
    return merged


def _depth(value: Any, path: Path) -> int:
    """How many steps of a path are there."""
    for depth, step in enumerate(path):
        inside = isinstance(value, dict) and step in value
        if not inside and not (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            return depth
        value = value[step]
    return len(path)
