"""What the node leaves for the gateway's process. Apart from it, as the node needs nothing that serves HTTP."""

from __future__ import annotations

import msgspec

from flowmesh.messages.cloud import S3Access

NOTE_FILE = "gateway.json"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the node tells the gateway; the token comes over the pipe, or is in a file that may change."""

    socket: str
    key: str
    orchestrator_url: str | None = None
    token_file: str | None = None
    s3: S3Access | None = None
    mode: int = 0o600
    """Of the socket."""
