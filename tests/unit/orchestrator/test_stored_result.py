"""What of a result goes to Redis: all of a small one, a summary of a large one, nothing through a link."""

from __future__ import annotations

import json
from pathlib import Path

from flowmesh.orchestrator.stored_result import FILE, MAX_BYTES, stored_result


def test_a_small_result_as_it_is(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"ok": true}')
    assert stored_result(str(tmp_path)) == b'{"ok": true}'


def test_a_summary_of_a_large_one(tmp_path: Path) -> None:
    items = [{"output": "x" * 1000} for _ in range(2000)]
    result = {"ok": True, "items": items, "model": "m", **{f"field{n}": "y" * 4000 for n in range(400)}}
    (tmp_path / FILE).write_text(json.dumps(result))
    data = stored_result(str(tmp_path))
    found = json.loads(data)
    assert len(data) < MAX_BYTES
    assert (found["ok"], found["model"], found["truncated"]) == (True, "m", True)
    assert found["items"] == {"omitted": "list", "length": 2000}
    assert found["size_bytes"] == (tmp_path / FILE).stat().st_size
    assert found["path"] == f"{tmp_path}/{FILE}"


def test_nothing_where_there_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / FILE).symlink_to(tmp_path / "secret")
    assert stored_result(str(tmp_path)) == b""
    assert stored_result(str(tmp_path / "missing")) == b""
