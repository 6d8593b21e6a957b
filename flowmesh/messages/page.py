"""What a node tells the process that serves its page."""

from __future__ import annotations

import msgspec

NOTE_FILE = "page.json"
LISTENING = "listening"
"""The phase of a page process that takes connections."""
FAULT = "fault: "
"""What a phase begins with that says why it cannot serve."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the page process starts with. The address of Redis comes over the pipe: it may contain a password."""

    state_dir: str
    host: str
    port: int
    token_file: str | None = None
    hosts: tuple[str, ...] = ()
    redis_password_file: str | None = None
