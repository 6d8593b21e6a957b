"""How a document names the model that another task serves, and where that is: `task:ID` in place of an address."""

from __future__ import annotations

import msgspec

from flowmesh.messages.wire import usable_task_id

PREFIX = "task:"


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task serves a model, with its key."""

    task_id: str
    base_url: str
    model: str
    """The name that requests give it."""
    api_key: str
    own: bool = False
    """Whether the task runs on the node that says so; else the address is what Redis has."""

    def __repr__(self) -> str:
        return f"Served({self.task_id!r}, {self.base_url!r}, {self.model!r})"


def names_task(address: str) -> bool:
    """Whether an address names a task, well or badly."""
    return address.startswith(PREFIX)


def task_of(address: str) -> str | None:
    """The id of the task that an address names; None: it names none."""
    return usable_task_id(address.removeprefix(PREFIX)) if names_task(address) else None
