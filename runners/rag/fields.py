"""Known top-level fields of a task, and what happens to unknown ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context

COMMON = ("taskType", "resources", "output", "shard", "timeoutSec", "retainLogs", "env")
"""Fields of every task type; the node handles most of them."""


def check_known(ctx: Context, spec: dict[str, Any], where: str, own: Sequence[str]) -> None:
    """Refuse a top-level field that resembles a known one; log any other unknown one.

    The node and the orchestrator have their own fields at this level, so not every unknown field is an error.

    Args:
        own: the task type's own fields.
    """
    known = [*COMMON, *own]
    for name in spec:
        if name in known or name.startswith("_"):
            continue
        hint = nearest(name, known)
        if hint.startswith("did you mean"):
            raise BadRequest(f"{where}.{name}: unknown field; {hint}")
        ctx.log.warning("%s.%s is not a field of this task type and was not used", where, name)
