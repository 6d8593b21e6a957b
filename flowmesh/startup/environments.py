"""From settings to the task types that the node offers, and the environments whose fork servers run them."""

from __future__ import annotations

import sys

from flowmesh.errors import ConfigError, FieldError
from flowmesh.processes.server_client import Environment
from flowmesh.settings_schema import Settings
from flowmesh.tasks.types import DEFAULT, DELIVERY, LIGHT, Catalogue, TaskType, catalogue, known_types

CANARY = "runners.canary:check"
REHEARSAL = "runners.child:rehearse"
ALWAYS = ("runners.child",)
DELIVERS = ("flowmesh.results.child",)


def task_types(settings: Settings) -> dict[str, TaskType]:
    """All task types, whether or not their libraries are installed.

    Raises:
        ConfigError: the settings of one are not valid.
    """
    try:
        return known_types(settings)
    except FieldError as error:
        raise ConfigError(str(error)) from None


def plan(settings: Settings) -> tuple[Catalogue, dict[str, Environment]]:
    """The task types that can be offered, and all environments.

    Raises:
        ConfigError: the settings of a task type are not valid.
    """
    types = task_types(settings)
    interpreters: dict[str, str | None] = {LIGHT: None, DEFAULT: None}
    interpreters |= {name: each.python for name, each in settings.environments.items()}
    found = catalogue(types, interpreters)
    environments = {}
    for name, python in interpreters.items():
        preload = list(ALWAYS)
        for each in found.offered.values():
            if each.environment == name:
                preload += each.preload
        if (own := settings.environments.get(name)) is not None:
            preload += own.preload
        environments[name] = Environment(
            name=name,
            python=python or sys.executable,
            preload=tuple(dict.fromkeys(preload)),
            canary=None if name == LIGHT else CANARY,
            rehearsal=REHEARSAL,
        )
    environments[DELIVERY] = Environment(name=DELIVERY, python=sys.executable, preload=DELIVERS, contained=False)
    return found, environments
