"""The check of a document before its process: all faults in the child's words, and never where the child may differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flowmesh.errors import FieldError
from flowmesh.execution.admission import Accepted, accept, check_fields, with_all_faults
from flowmesh.messages.job import Job
from flowmesh.redaction import Redactor
from flowmesh.settings.schema import EnvironmentSettings, Settings, TaskTypeSettings
from flowmesh.tasks import checks
from flowmesh.tasks.catalogue import Catalogue, known_types
from runners import child
from runners.api import Context

ECHO = {"taskType": "echo", "delaySec": "soon", "delaySecs": 2}
SFT = {"taskType": "sft", "training": {"learning_rat": 1}}


def accepted(spec: dict[str, Any], settings: Settings, folder: Path, **more: Any) -> Accepted:
    message = {"task_id": "t", "assigned_worker": "w", "task": {"spec": spec}, **more}
    catalogue = Catalogue(offered=known_types(settings), missing={})
    return accept(json.dumps(message).encode(), settings=settings, catalogue=catalogue, results_dir=folder)


@pytest.mark.parametrize("spec", [ECHO, SFT], ids=["echo", "sft"])
def test_the_words_are_the_childs(spec: dict[str, Any], tmp_path: Path) -> None:
    if spec is SFT:
        pytest.importorskip("trl", reason="without the extra training a node does not offer sft")
    task = accepted(spec, Settings(), tmp_path)
    with pytest.raises(FieldError) as refused:
        check_fields(task, Settings(), Redactor())
    job = Job(
        attempt=1, task_id="t", task_type=task.type.name, runner=task.type.runner, task=task.task,
        out_dir=str(tmp_path), results_dir=str(tmp_path), cache_dir=str(tmp_path), tmp_dir=str(tmp_path),
    )  # fmt: skip
    outcome = child.run(job, Context(job))
    assert outcome.fault == "bad_request"
    assert str(refused.value) == outcome.message


def test_what_only_the_child_knows_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Settings(
        environments={"old": EnvironmentSettings(python=sys.executable)},
        task_types={"echo": TaskTypeSettings(environment="old")},
    )
    own = Settings(task_types={"echo": TaskTypeSettings(runner="my.package:Echo")})
    for settings in (other, own):
        check_fields(accepted(ECHO, settings, tmp_path), settings, Redactor())
    children = [{"task_id": "c", "spec": {"taskType": "echo"}}]
    check_fields(accepted(ECHO, Settings(), tmp_path, merged_children=children), Settings(), Redactor())
    check_fields(accepted(ECHO | {"long": "x" * 70_000}, Settings(), tmp_path), Settings(), Redactor())
    with pytest.raises(FieldError):
        check_fields(accepted(ECHO, Settings(), tmp_path), Settings(), Redactor())
    monkeypatch.setitem(checks._loaded, "runners.checks", (0, 0))
    check_fields(accepted(ECHO, Settings(), tmp_path), Settings(), Redactor())


def test_a_check_that_fails_refuses_nothing(tmp_path: Path) -> None:
    task = accepted({"taskType": "echo"}, Settings(), tmp_path)
    broken = type(task.type)(name="echo", runner="x:Y", check="json:no_such_function")
    import msgspec

    check_fields(msgspec.structs.replace(task, type=broken), Settings(), Redactor())


def test_the_nodes_errors_come_with_the_types(tmp_path: Path) -> None:
    data = json.dumps(
        {"task_id": "t", "task": {"spec": {"taskType": "echo", "delaySec": -1, "timeoutSec": -1}}}
    ).encode()
    own = FieldError("spec.timeoutSec: expected more", "spec.timeoutSec")
    found = with_all_faults(own, data, Settings(), known_types(Settings()))
    assert [fault.partition(":")[0] for fault in found.faults] == ["spec.timeoutSec", "spec.delaySec"]
    assert with_all_faults(own, b"{", Settings(), {}) is own
