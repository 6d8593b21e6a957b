"""A task on several nodes, as the runner of one member sees it: which member this is, and over what they meet.

Every member runs the task's document; the node has agreed with the others who is which (see `Gang`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flowmesh.messages.nodes import Gang
from flowmesh.web.own_address import address_towards
from runners.api import Context

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""By which gloo and NCCL are told on which interface the other members are."""


def gang_of(ctx: Context) -> Gang | None:
    """This member's place; None where it is the only one."""
    gang = ctx.job.gang
    return gang if gang is not None and gang.size > 1 else None


def asks_for_nodes(spec: Mapping[str, Any]) -> bool:
    """Whether a document is for several nodes."""
    return spec.get("nodes") not in (None, 1)


def of_member(gang: Gang) -> dict[str, Any]:
    """What a member that is not the first reports: the result of rank 0 is the task's."""
    return {"ok": True, "rank": gang.rank, "size": gang.size}


def endpoint(gang: Gang) -> str:
    """`host:port` of rank 0's node."""
    return f"[{gang.host}]:{gang.port}" if ":" in gang.host else f"{gang.host}:{gang.port}"


def environment(gang: Gang) -> dict[str, str]:
    """The variables by which programs find each other, as torchrun and Slurm's users name them.

    RANK and WORLD_SIZE count one process a node; torchrun replaces them for its ranks.
    """
    return {
        "MASTER_ADDR": gang.host,
        "MASTER_PORT": str(gang.port),
        "NODE_RANK": str(gang.rank),
        "NNODES": str(gang.size),
        "RANK": str(gang.rank),
        "WORLD_SIZE": str(gang.size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "FLOWMESH_RDZV_ID": gang.rdzv_id,
        **interfaces(gang.host),
    }


def interfaces(host: str) -> dict[str, str]:
    """On which of this machine's interfaces gloo and NCCL reach `host`, unless the environment says so already.

    By themselves they take the interface of the machine's own name, which often is loopback.
    """
    name = interface_to(host)
    return {} if name is None else {variable: name for variable in INTERFACES if variable not in os.environ}


def interface_to(host: str) -> str | None:
    """The interface whose address this machine uses towards `host`; None: it cannot be found."""
    import psutil  # only members of a gang need it

    try:
        address = address_towards(host)
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
