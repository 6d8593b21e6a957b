"""What a node's launcher leaves for its ranks: the order file, and the names of the files in the group's folder."""

from __future__ import annotations

import msgspec

from flowmesh.messages.job import Job
from runners.training.devices import Layout
from runners.training.inputs import Inputs

ORDER_FILE = "order.json"
SOCKET = "pipe.sock"
"""The unix socket on which the rank that leads the node asks for the task's pipe."""
RANK_MODULE = "runners.training.rank_process"
"""What torchrun runs as each rank, given the group's folder."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's process needs to know."""

    task_type: str
    job: Job
    fetched: Inputs
    layout: Layout
