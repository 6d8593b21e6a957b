"""Files in a group's folder by which a node's launcher starts its ranks."""

from __future__ import annotations

import msgspec

from flowmesh.messages.job import Job
from runners.training.devices import Layout
from runners.training.inputs import Inputs

ORDER_FILE = "order.json"
SOCKET = "pipe.sock"
"""The unix socket on which the rank that leads the node asks for the task's pipe."""
RANK_MODULE = "runners.training.rank_process"
"""The module that torchrun runs as each rank. Its argument is the group's folder."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Input of a rank's process."""

    task_type: str
    job: Job
    fetched: Inputs
    layout: Layout
