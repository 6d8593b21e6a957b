"""How a task asks the node's gateway: HTTP on a unix socket, with these headers."""

from __future__ import annotations

import msgspec

KEY = "X-FlowMesh-Key"
"""Of the request: proves that a task of this node asks."""
TIMEOUT = "X-FlowMesh-Timeout"
"""Of the request: seconds to connect to the orchestrator, and for each read."""
ERROR = "X-FlowMesh-Error"
"""Of the answer: why the gateway itself answers, with the status 502 where the orchestrator gave no answer."""
NO_TOKEN = "the node's token is in a file that cannot be read now"


class Gateway(msgspec.Struct, frozen=True):
    """Where a task finds it."""

    socket: str
    """Its path."""
    key: str
