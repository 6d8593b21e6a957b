"""conf/flows/flowmesh_dagster.py on the real Dagster, with its storage in a folder."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from tests.flows.conftest import START_S, Place
from tests.kit.support import until

pytestmark = [
    pytest.mark.flows,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(importlib.util.find_spec("dagster") is None, reason="scripts/test runs it in .venv-flows"),
]


@pytest.fixture(autouse=True)
def home(place: Place) -> None:
    folder = place.folder / "dagster"
    folder.mkdir(exist_ok=True)
    (folder / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    place.env["DAGSTER_HOME"] = str(folder)


def test_outputs_logs_and_retries(place: Place) -> None:
    assert place.start("jobs_of_tests.py", "several").wait() == 0
    found = json.loads(re.findall(r"^\{.*\}$", place.text(), re.MULTILINE)[-1])
    assert found == {"short": 6, "worker": "w1", "logged": True, "again": 8, "failed": "error"}
    assert (place.folder / "dies").read_text() == "xx", "the op's RetryPolicy"
    assert (place.folder / "fails").read_text() == "x", "no retry of what fails anywhere"


def test_a_killed_run_finds_its_task_and_a_stopped_one_cancels_it(place: Place) -> None:
    killed = place.start("jobs_of_tests.py", "go_on")
    task = place.running()
    killed.kill()
    killed.wait()

    again = place.start("jobs_of_tests.py", "go_on")
    until(lambda: f"{task.task_id}: found, running" in place.text(), "the run from the failure has found it", START_S)
    assert [each.task_id for each in place.client.tasks()] == [task.task_id]
    again.terminate()
    again.wait()
    end = place.client.wait(task.task_id)
    assert (end.verdict, end.error, end.attempts) == ("cancelled", "the Dagster run was stopped", 1)
