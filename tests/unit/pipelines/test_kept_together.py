"""What ran as one task is kept in one step: a driver that dies there leaves nothing to run a second time."""

from __future__ import annotations

import pytest

from flowmesh.errors import FlowMeshError
from flowmesh.pipelines.parts import Record
from flowmesh.pipelines.store import FolderStore
from tests.unit.pipelines.in_memory import Memory, Place, run, states

SPEC = {
    "taskType": "inference",
    "data": {"type": "list", "items": ["x"]},
    "graph": {"nodes": [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
}


class Died(Exception):
    pass


class DiesAfterSaving(Memory):
    """A store whose process dies right after its first step."""

    def save(self, *records):
        super().save(*records)
        raise Died


def answer(task):
    children = {child["task_id"]: {"items": []} for child in task.document.get("merge_children", ())}
    return {"ok": True, "items": [], "children": children}


def test_a_driver_that_dies_after_a_merged_tasks_end_leaves_none_of_its_stages_to_run_again():
    dies, place = DiesAfterSaving(), Place(answer)
    with pytest.raises(Died):
        run(SPEC, place, dies, new_run=lambda stage: stage.key)
    assert place.ran == ["a"]
    later = Memory()
    later.records = dies.records
    driver, place, _ = run(
        SPEC, Place(answer), later, new_run=lambda stage: stage.key, merged={"p.a": ("p.a", "p.b", "p.c")}
    )
    assert place.ran == []
    assert states(driver) == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}


def test_a_task_that_runs_by_itself_stays_so_with_the_next_driver():
    """A merged task has failed, and each of its stages runs again: the next driver merges none of these."""
    _, place, _ = run(SPEC, Place(answer), merged={"p.a": ("p.a",), "p.b": ("p.b",)})
    assert [(task.task_id, len(task.document.get("merge_children", ()))) for task in place.tasks] == [
        ("p.a", 0),
        ("p.b", 0),
        ("p.c", 0),
    ]


def test_a_folder_keeps_all_of_them_or_none(tmp_path):
    ends = [Record(name=name, key="k", run="new", ok=True, task_ids=(f"p.{name}",)) for name in ("a", "b")]
    old = [Record(name=end.name, key="k", run="old", ok=False, task_ids=end.task_ids) for end in ends]
    with FolderStore(tmp_path) as store:
        store.save(old[0])
        blocked = tmp_path / "stages" / "b.json"
        blocked.mkdir()  # the second file cannot be written
        with pytest.raises(FlowMeshError):
            store.save(*ends)
        assert "b" not in {path.stem for path in (tmp_path / "stages").glob("*.json") if path.is_file()}
        blocked.rmdir()
    with FolderStore(tmp_path) as store:
        assert {name: record.run for name, record in store.load().items()} == {"a": "new", "b": "new"}
        store.save(old[0])
        assert {name: record.run for name, record in store.load().items()} == {"a": "old", "b": "new"}
