"""What a stage's run consists of: one task, or one for each shard."""

from __future__ import annotations

from typing import Any

import msgspec


class Part(msgspec.Struct, kw_only=True):
    """One task of a stage."""

    stage: str
    task_id: str
    spec: dict[str, Any]
    """With all references replaced."""
    index: int = 0
    """Of its shard."""
    merge_key: str | None = None
    """Equal for parts that may run as one task; None: it runs by itself."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a stage, as it is kept."""

    name: str
    key: str
    """Digest of its spec and of the runs whose results it used."""
    run: str
    """Of this run alone."""
    ok: bool
    task_ids: tuple[str, ...]
    result: dict[str, Any] | None = None
    error: str | None = None
    verdict: str | None = None
    out_dir: str | None = None
    """Of its first task."""
    worker: str | None = None
    """That its first task ended on, where that is known."""
