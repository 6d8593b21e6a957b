"""An outcome is read whole, but a large one without its result."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flowmesh.execution.launch.spool import SMALL_BYTES, decode_outcome
from flowmesh.messages.job import ArchiveRequest, CommandExit, Fault, Outcome, UploadRequest
from flowmesh.messages.rows import Counts

WHOLE = Outcome(
    attempt=3,
    ok=False,
    result={"ok": True},
    fault=Fault.ERROR,
    message="m",
    detail="d",
    archives=(ArchiveRequest(folder="f"),),
    uploads=(UploadRequest(path="p", field="f"),),
    phases={"load": 1.0},
    rows=Counts(done=1, total=2),
    command=CommandExit(code=1),
    warnings=("w",),
    versions={"torch": "2"},
    spent_usd=0.5,
)


@pytest.mark.parametrize("size", [10, SMALL_BYTES])
def test_everything_but_a_large_result_is_read(size: int, tmp_path: Path) -> None:
    defaults = Outcome(attempt=0, ok=True)
    same = [name for name in Outcome.__struct_fields__ if getattr(WHOLE, name) == getattr(defaults, name)]
    assert not same, "a field without a value here is not checked"
    outcome = msgspec.structs.replace(WHOLE, result={"text": "x" * size})
    path = tmp_path / "outcome.json"
    path.write_bytes(msgspec.json.encode(outcome))
    found = decode_outcome(path)
    assert found == (outcome if size < SMALL_BYTES else msgspec.structs.replace(outcome, result=None))
