"""conf/flows/flowmesh_airflow.py on the real Airflow, by `dag.test`, with its database in a folder."""

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
    pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="scripts/test runs it in .venv-flows"),
]


def runs(place: Place) -> list[dict]:
    """State, attempts and value of each task, for each DAG run that has ended."""
    return [json.loads(line) for line in re.findall(r"^\{.*\}$", place.text(), re.MULTILINE)]


def test_values_retries_and_the_same_run_again_then_sigterm(place: Place) -> None:
    place.env |= {
        "AIRFLOW_HOME": str(place.folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(place.folder),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__API_AUTH__JWT_SECRET": "any that is long enough: 64 bytes are, for the algorithm by default",
    }
    process = place.start("dags_of_tests.py")
    until(lambda: len(runs(place)) == 2 or process.poll() is not None, "two runs have ended", START_S)
    first, same = runs(place)
    assert first["short[-1]"] == ["success", 1, {"result": 6}], "templated, typed"
    assert first["again[-1]"][:2] == ["success", 2], "Airflow's retry"
    assert (place.folder / "airflow-dies").read_text() == "xx"
    assert first["failed[-1]"] == ["failed", 1, None], "no retry of what fails anywhere"
    assert (place.folder / "airflow-fails").read_text() == "x"
    assert "a line" in place.text()
    assert (same["short[-1]"], (place.folder / "airflow-once").read_text()) == (first["short[-1]"], "x"), "found"

    task = place.running()
    process.terminate()
    assert process.wait() == 0
    end = place.client.wait(task.task_id)
    assert (end.verdict, end.error, end.attempts) == ("cancelled", "the Airflow task was stopped", 1)
    assert runs(place)[-1] == {"wait[-1]": ["failed", 1, None]}, "Airflow does not retry"
