"""Makes the jobs, outcomes and folders of deliveries."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flowmesh.messages.job import ArchiveRequest, Outcome
from flowmesh.messages.output import HttpDestination, LocalDestination, read_output
from flowmesh.results.job import DeliveryJob, Target
from flowmesh.settings.schema import ArchiveSettings

QUICK: dict[str, Any] = {
    "first_backoff_s": 0.01,
    "max_backoff_s": 0.05,
    "total_timeout_s": 20.0,
    "archive": ArchiveSettings(pigz_threads=2),
}


def http(url: str, **fields: Any) -> HttpDestination:
    made = read_output({"destination": {"type": "http", "url": url, **fields}}).destination
    assert isinstance(made, HttpDestination)
    return made


def target(out_dir: Path, destination: Any = None, task_id: str = "t-1", artifacts: tuple[str, ...] = ()) -> Target:
    return Target(
        task_id=task_id, out_dir=str(out_dir), destination=destination or LocalDestination(), artifacts=artifacts
    )


def delivery(task: Target, **fields: Any) -> DeliveryJob:
    return DeliveryJob(**{"attempt": 1, "worker_id": "w-1", "task": task, **QUICK, **fields})


def outcome(result: dict[str, Any] | None = None, **fields: Any) -> Outcome:
    return Outcome(**{"attempt": 1, "ok": True, "result": {"ok": True} if result is None else result, **fields})


def trained(folder: str = "final_model") -> Outcome:
    return outcome({"task_id": "t-1", "training_successful": True}, archives=(ArchiveRequest(folder=folder),))


def said(folder: Path, name: str = "responses.json") -> Any:
    return json.loads((folder / name).read_text())


def manifest(folder: Path) -> dict[str, Any]:
    return {entry["name"]: entry for entry in said(folder, "manifest.json")["entries"]}


def with_model(out: Path, name: str = "final_model", size: int = 3_000_000) -> Path:
    (out / name).mkdir()
    (out / name / "weights.bin").write_bytes(os.urandom(size))
    (out / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (out / "checkpoints" / "checkpoint-5" / "x").write_text("x")
    return out / name


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
