"""What `flowmesh doctor` says of one thing: how it is, and the command that mends it."""

from __future__ import annotations

import enum

import msgspec


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"
    """Something is left out, and nothing that was asked for misses it."""
    WARN = "warn"
    """It works, and not as well as it could."""
    BROKEN = "broken"


class Finding(msgspec.Struct, frozen=True):
    area: str
    level: Level
    text: str
    remedy: str = ""
    """A command, or what to do; empty where nothing needs to be."""
