"""vLLM over several nodes by its own multiprocessing, without Ray: the first member has the engine, the others compute.

Every member works out the engine's arguments by itself, from the document and what the first one has announced.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from flowmesh.messages.nodes import Gang
from flowmesh.web.own_address import address_towards
from runners.gang import interfaces
from runners.inference.members import Lead, Start
from runners.inference.vllm_args import Work


def announce(lead: Lead, *, work: Work, seed: int) -> dict[str, Any]:
    """Have the other members start; returns the first one's engine arguments. Errors as for `Lead.announce`."""
    gang = lead.gang
    set_addresses(gang)
    start = Start(port=_free_port(gang.host), work=work, seed=seed)
    lead.announce(start)
    return member_arguments(gang, start)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def member_arguments(gang: Gang, start: Start) -> dict[str, Any]:
    """Engine arguments that are set for this member."""
    return {
        "nnodes": gang.size,
        "node_rank": gang.rank,
        "master_addr": gang.host,
        "master_port": start.port,
        "distributed_executor_backend": "mp",
        "seed": start.seed,
    }


def set_addresses(gang: Gang) -> None:
    """Have vLLM's processes reach each other on the network over which the members do."""
    os.environ.update(interfaces(gang.host))
    with contextlib.suppress(OSError):  # vLLM then finds one by itself
        os.environ.setdefault("VLLM_HOST_IP", address_towards(gang.host))
