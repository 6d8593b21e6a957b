"""What a supervisor gives to the driver that it starts."""

from __future__ import annotations

import msgspec


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One line of JSON on the driver's standard input."""

    url: str
    """Redis', with its password."""
    topic: str
    pipeline_id: str
    attempt: int
    """The number of this driver."""
    node_id: str
    lease_ms: int
    result_ttl_s: int
