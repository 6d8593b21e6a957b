"""The fields of a pipeline's document as structs. docs/pipelines.md describes each."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

MAX_STAGES = 1000
"""Of a pipeline, `foreach` expanded."""
MAX_SHARDS = 256
MAX_WHEN_CHARS = 1000
STAGE_NAME = r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?$"

StageName = Annotated[
    str,
    Meta(
        pattern=STAGE_NAME,
        description="a name of up to 64 letters, digits and . _ - that begins and ends with a letter, digit or _",
    ),
]
NoStages = Annotated[list[Any], Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the sections."""


class Parallel(Section, frozen=True):
    """`parallel`: divide the stage's data into shards."""

    enabled: bool = False
    max_shards: Annotated[int, Meta(ge=1, le=MAX_SHARDS)] | None = None
    """None: as many as tasks can run at once."""
    contiguous: bool | None = None
    """False: every n-th row instead of neighbouring rows."""


class Condition(Section, frozen=True):
    """`condition`: run the stage only where a field of another stage has a value. `when` says more."""

    node: StageName
    field: str
    equals: Any


class StageFields(Section, frozen=True):
    """One entry of `spec.stages` or `spec.graph.nodes`, its own spec aside."""

    name: StageName
    spec: dict[str, Any] | UnsetType = UNSET
    """Missing: all fields beside those named here are the stage's spec."""
    dependsOn: tuple[StageName, ...] | None = None
    when: bool | Annotated[str, Meta(max_length=MAX_WHEN_CHARS)] | None = None
    condition: Condition | None = None
    foreach: dict[str, NoStages] | StageName | None = None
    parallel: Parallel | None = None
    merge: bool | None = None


class Graph(Section, frozen=True):
    """`spec.graph`"""

    nodes: Annotated[tuple[dict[str, Any], ...], Meta(min_length=1)]


OWN = frozenset(StageFields.__struct_fields__) - {"spec"}
"""A stage's own fields. All but `name` may also be in its spec."""
ALIASES = {"depends_on": "dependsOn", "dependencies": "dependsOn"}
