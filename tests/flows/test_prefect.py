"""conf/flows/flowmesh_prefect.py on the real Prefect, with its server on a local database."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Iterator

import pytest
import requests

from tests.flows.conftest import START_S, Place
from tests.kit.support import until

pytestmark = [
    pytest.mark.flows,
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(importlib.util.find_spec("prefect") is None, reason="scripts/test runs it in .venv-flows"),
]


class Api:
    """Prefect's server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: object) -> dict:
        answer = requests.post(self.url + path, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def there(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=60).ok
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prefect(place: Place) -> Iterator[Api]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place.env |= {
        "PREFECT_HOME": str(place.folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    place.start(
        "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui", "--no-services"
    )
    api = Api(place.env["PREFECT_API_URL"])
    until(api.there, "the server answers", START_S)
    return api


def test_results_logs_and_retries(place: Place, prefect: Api) -> None:
    assert place.start("flows_of_tests.py", "several").wait() == 0
    found = json.loads(re.findall(r"^\{.*\}$", place.text(), re.MULTILINE)[-1])
    assert found["short"] == {"number": 6}, "typed"
    assert (found["same"], (place.folder / "once").read_text()) == (found["short"], "x"), "found, not run again"
    assert (found["again"], (place.folder / "dies").read_text()) == ({"number": 8}, "xx"), "Prefect's retry"
    assert found["failed"][0] == "error"
    assert "not today" in found["failed"][1]
    assert (place.folder / "fails").read_text() == "x", "no retry of what fails anywhere"
    assert found["left"] == "cancelled", "the hook cancels those of its flow run"
    assert found["other"] != "done"
    lines = until(lambda: [each["message"] for each in prefect.post("/logs/filter")], "its log")
    assert "a line" in lines
    rows = prefect.post("/artifacts/filter")
    assert [json.loads(row["data"])[0]["worker"] for row in rows] == ["w1", "w1", "w1"]


def test_a_killed_flow_finds_its_task_and_a_stopped_one_cancels_it(place: Place, prefect: Api) -> None:
    flow_id = prefect.post("/flows/", name="direct")["id"]
    run_id = prefect.post("/flow_runs/", flow_id=flow_id, state={"type": "PENDING"})["id"]
    place.env |= {"PREFECT__FLOW_ENTRYPOINT": "flows_of_tests.py:direct", "PREFECT__FLOW_RUN_ID": run_id}
    killed = place.start("-m", "prefect.engine", run_id)
    task = place.running()
    assert task.task_id.startswith(f"prefect-{run_id}-")
    killed.kill()
    killed.wait()

    state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    prefect.post(f"/flow_runs/{run_id}/set_state", state=state, force=True)
    again = place.start("-m", "prefect.engine", run_id)
    until(lambda: f"{task.task_id}: found, running" in place.text(), "the run that goes on has found it", START_S)
    assert [each.task_id for each in place.client.tasks()] == [task.task_id]
    again.terminate()
    assert again.wait() != 0
    end = place.client.wait(task.task_id)
    assert (end.verdict, end.error, end.attempts) == ("cancelled", "the Prefect flow run was stopped", 1)
