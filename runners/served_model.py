"""The model that another task serves, where a document names one as `task:ID` in place of an address."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from flowmesh.messages.serving import PREFIX, Served, names_task, task_of
from runners.api import BadRequest, Context
from runners.data import addresses


def check_name(value: str, where: str) -> None:
    """Raises BadRequest for a `task:` without the id of a task."""
    if names_task(value) and task_of(value) is None:
        raise BadRequest(f"{where}: expected the id of a task behind {PREFIX!r} (found {value[:80]!r})")


def served_model(ctx: Context, value: str, where: str) -> Served | None:
    """Where the model is served that `value` names; None: it is an address.

    The node has looked it up. What Redis says of other nodes' tasks is checked as an address of the document is.

    Raises:
        BadRequest: the address is not allowed here, or the node has not looked.
    """
    if not names_task(value):
        return None
    served = ctx.job.served
    if served is None or served.task_id != task_of(value):
        raise BadRequest(f"{where}: this node does not look up where {value[:200]} serves its model; give an address")
    if not served.own:
        _check(ctx, served, where)
    return served


def _check(ctx: Context, served: Served, where: str) -> None:
    parts = urlsplit(served.base_url)
    try:
        host = str(ipaddress.ip_address(parts.hostname or ""))
    except ValueError:
        host = ""
    if parts.scheme not in ("http", "https") or not host:
        raise BadRequest(f"{where}: the address of the task {served.task_id} in Redis is not http://IP:PORT")
    try:
        addresses.check(ctx.job.permits, served.base_url)
    except addresses.LocalAddress:
        raise BadRequest(
            f"{where}: the task {served.task_id} serves on another node at {host}, which leads to this machine here; "
            "set its serve.host to an address that other nodes reach, or allow the host in the node's tasks.local_hosts"
        ) from None
