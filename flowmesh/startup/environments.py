"""Computes, from the settings, the task types that the node offers and the environments that run them."""

from __future__ import annotations

import sys

from flowmesh.errors import ConfigError, FieldError
from flowmesh.processes.server_client import Environment
from flowmesh.settings.schema import Settings
from flowmesh.tasks.catalogue import (
    DEFAULT,
    DELIVERY,
    LIGHT,
    Catalogue,
    TaskType,
    catalogue,
    known_types,
)

CANARY = "runners.canary:check"
"""What the first child of each fork server with libraries must run without error."""
PREPARE = "runners.child:prepare"
"""What each fork server of tasks calls after its imports."""
REHEARSAL = "runners.child:rehearse"
"""What each child calls before it waits for its task."""
ALWAYS = ("runners.child",)
"""Imported by the fork server of every environment of tasks."""
DELIVERS = (
    "flowmesh.results.child",
    "flowmesh.results.archive",
    "flowmesh.results.gateway",
    "flowmesh.reporting.webhook_child",
)
"""Imported by the fork server of delivery children and of those that send notifications."""


def task_types(settings: Settings) -> dict[str, TaskType]:
    """All task types, whether or not their libraries are installed.

    Raises:
        ConfigError: the settings of a task type are not valid.
    """
    try:
        return known_types(settings)
    except FieldError as error:
        raise ConfigError(str(error)) from None


def plan(settings: Settings) -> tuple[Catalogue, dict[str, Environment]]:
    """The task types that the node can offer, and all environments by name, that of delivery children included.

    Raises:
        ConfigError: the settings of a task type are not valid.
    """
    types = task_types(settings)
    interpreters: dict[str, str | None] = {LIGHT: None, DEFAULT: None}
    interpreters |= {name: each.python for name, each in settings.environments.items()}
    found = catalogue(types, interpreters, settings.tasks)
    environments = {}
    for name, python in interpreters.items():
        preload = list(ALWAYS)
        for each in found.offered.values():
            if each.environment == name:
                preload += each.preload
        if (configured := settings.environments.get(name)) is not None:
            preload += configured.preload
        environments[name] = Environment(
            name=name,
            python=python or sys.executable,
            preload=tuple(dict.fromkeys(preload)),
            canary=None if name == LIGHT else CANARY,
            prepare=PREPARE,
            rehearsal=REHEARSAL,
        )
    environments[DELIVERY] = Environment(
        name=DELIVERY, python=sys.executable, preload=DELIVERS, contained=False, hidden=True
    )
    return found, environments
