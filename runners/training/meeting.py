"""Where the nodes of one training meet: the document says so, or the node that has brought them together."""

from __future__ import annotations

import msgspec

from runners.api import BadRequest, Context
from runners.fields import Faults
from runners.gang import asks_for_nodes, endpoint, gang_of
from runners.training.settings import Training

MEETING = ("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id")
"""Fields of `training` by which nodes meet."""


def with_gang(training: Training, ctx: Context) -> Training:
    """Fill in where the nodes meet, if the node has brought them together.

    Raises:
        BadRequest: the document says so itself, besides spec.nodes.
    """
    if asks_for_nodes(ctx.spec):
        faults = Faults()
        for field in MEETING:
            if field in (ctx.spec.get("training") or {}):
                faults.read(lambda field=field: _refuse(field))  # type: ignore[misc]
        faults.check()
    if (gang := gang_of(ctx)) is None:
        return training
    return msgspec.structs.replace(
        training, nnodes=gang.size, node_rank=gang.rank, rdzv_endpoint=endpoint(gang), rdzv_id=gang.rdzv_id
    )


def _refuse(field: str) -> None:
    raise BadRequest(f"spec.training.{field}: spec.nodes sets it; leave one of them out")
