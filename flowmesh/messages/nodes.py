"""`spec.nodes`: on how many nodes at once a task runs. A task on several is a gang: a member on each node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from flowmesh.errors import FieldError

WHERE = "spec.nodes"
MOST = 256
LONGEST_ID = 190
"""Characters of the id of a task on several nodes: its members' ids are longer."""
FROM_QUEUE = f"{WHERE}: a task on several nodes comes from the queue; submit it with --queue, or Client.queue"

Count = Annotated[int, Meta(ge=1, le=MOST)]


class NodeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`spec.nodes` as bounds: as many nodes as can be had, `min` at least."""

    min: Count
    max: Count


class Nodes(msgspec.Struct, frozen=True):
    """On how many nodes a task runs."""

    least: int = 1
    most: int = 1

    @property
    def is_gang(self) -> bool:
        return self.most > 1

    @property
    def text(self) -> str:
        """For people: `2`, or `2-4`."""
        return str(self.most) if self.least == self.most else f"{self.least}-{self.most}"


ONE = Nodes()


class Gang(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a task on several nodes that this child runs, and where its members meet."""

    task_id: str
    """Of the task; a member of another rank than 0 has an id of its own on its node."""
    rank: int
    """From 0. The result of rank 0 is the task's."""
    size: int
    """How many members this attempt has, each on a node of its own."""
    host: str
    """The address at which the others reach rank 0's node."""
    port: int
    """A port of that node that was free when the members were told it."""
    rdzv_id: str
    """Names this attempt of this task: members of an earlier one must not join."""


def read_nodes(wanted: int | NodeRange | None) -> Nodes:
    """The bounds in a decoded `spec.nodes`.

    Raises:
        FieldError: `max` is less than `min`.
    """
    if wanted is None:
        return ONE
    if isinstance(wanted, int):
        return Nodes(wanted, wanted)
    if wanted.max < wanted.min:
        raise FieldError(f"{WHERE}.max: {wanted.max} is less than min, which is {wanted.min}", f"{WHERE}.max")
    return Nodes(wanted.min, wanted.max)


def nodes_of(document: Mapping[str, Any]) -> Nodes:
    """The bounds of a task document.

    Raises:
        FieldError: `spec.nodes` cannot be read; names the field.
    """
    spec = document.get("spec")
    value = spec.get("nodes") if isinstance(spec, Mapping) else None
    if value is None:
        return ONE
    try:
        return read_nodes(msgspec.convert(value, Count | NodeRange))
    except msgspec.ValidationError:
        pass
    raise FieldError(
        f"{WHERE}: expected a number from 1 to {MOST}, or {{min, max}} of such numbers (found {value!r})", WHERE
    )


def member_id(task_id: str, rank: int) -> str:
    """The id of a member on its node: rank 0 has the task's own."""
    return task_id if rank == 0 else f"{task_id}.m{rank}"


def gang_of_member(member: str) -> str:
    """The task that an id would be a member of; the id itself where it is no member's."""
    task_id, dot, rank = member.rpartition(".m")
    return task_id if dot and rank.isdecimal() else member
