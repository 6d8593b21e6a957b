"""Secrets of an agent's task: read from environment variables by name, and known to the redactor of its output."""

from __future__ import annotations

import os

from flowmesh.redaction import Redactor
from runners.api import BadRequest


def from_env(name: str, where: str) -> str:
    """The value of a variable that a configuration names.

    Raises:
        BadRequest: it is not set; says how to set it.
    """
    value = os.environ.get(name)
    if not value:
        raise BadRequest(
            f"{where}: the variable {name} is not set for this task; set it where the node runs and name it in the "
            "node's tasks.pass_env"
        )
    return value


def task_redactor() -> Redactor:
    """A redactor for what models write that knows the secrets of this process's environment."""
    redact = Redactor(prose=True)
    redact.learn_named(os.environ)
    return redact
