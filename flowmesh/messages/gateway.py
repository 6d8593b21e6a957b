"""How a task asks the node's gateway: HTTP on a unix socket, with these headers."""

from __future__ import annotations

import msgspec

KEY = "X-FlowMesh-Key"
"""Of the request: proves that a task of this node asks."""
TIMEOUT = "X-FlowMesh-Timeout"
"""Of the request: seconds to connect to the orchestrator, and for each read."""
ERROR = "X-FlowMesh-Error"
"""Of the answer: why the gateway itself answers, with the status 502 where the orchestrator gave no answer."""
S3 = "X-FlowMesh-S3"
"""Of the request: BUCKET/KEY, URL-escaped, which it asks for instead of something of the orchestrator."""
S3_LIST = "X-FlowMesh-S3-List"
"""Of the request: that the key is a prefix, and how many objects are listed at most."""
S3_FAULT = "X-FlowMesh-S3-Fault"
"""Of the answer: the kind of an error (see `results.s3_client.Kind`), and a colon and its URL-escaped text."""
NO_TOKEN = "the node's token is in a file that cannot be read now"

NO_S3 = "this node reads nothing from S3: its setting cloud.read is empty"


class Gateway(msgspec.Struct, frozen=True):
    """Where a task finds it."""

    socket: str
    """Its path."""
    key: str
    token: bool = True
    """Whether it has the orchestrator's token."""
    s3: bool = False
    """Whether it reads from S3."""
