"""From settings to what the node offers and the fork servers it needs: environments, interpreters, preloads."""

from __future__ import annotations

import sys

from flowmesh.errors import ConfigError, FieldError
from flowmesh.processes.launcher import Lane
from flowmesh.settings_schema import Settings
from flowmesh.tasks.types import DEFAULT, DELIVERY, LIGHT, Catalogue, TaskType, catalogue, known_types

CANARY = "runners.canary:check"
REHEARSAL = "runners.child:rehearse"
ALWAYS = ("runners.child",)
DELIVERS = ("flowmesh.results.child",)


def task_types(settings: Settings) -> dict[str, TaskType]:
    """All task types, whether or not their libraries are here.

    Raises:
        ConfigError: one cannot be what the file says.
    """
    try:
        return known_types(settings)
    except FieldError as error:
        raise ConfigError(str(error)) from None


def plan(settings: Settings) -> tuple[Catalogue, dict[str, Lane]]:
    """The task types that can be offered, and the lane of each environment.

    Raises:
        ConfigError: a task type cannot be what the file says.
    """
    types = task_types(settings)
    interpreters: dict[str, str | None] = {LIGHT: None, DEFAULT: None}
    interpreters |= {name: each.python for name, each in settings.environments.items()}
    found = catalogue(types, interpreters)
    lanes = {}
    for name, python in interpreters.items():
        preload = list(ALWAYS)
        for each in found.offered.values():
            if each.environment == name:
                preload += each.preload
        if (own := settings.environments.get(name)) is not None:
            preload += own.preload
        lanes[name] = Lane(
            name=name,
            python=python or sys.executable,
            preload=tuple(dict.fromkeys(preload)),
            canary=None if name == LIGHT else CANARY,
            rehearsal=REHEARSAL,
        )
    lanes[DELIVERY] = Lane(name=DELIVERY, python=sys.executable, preload=DELIVERS, contained=False)
    return found, lanes
