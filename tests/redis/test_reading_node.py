"""What documents may read on real nodes: as the node's user, as a task user, and under `flowmesh run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT
from tests.kit.support import Node, Orchestrator, RedisServer, short_dir

pytestmark = pytest.mark.redis

READS = '[task_types.reads]\nrunner = "tests.kit.runners_for_tests:Reads"\nenvironment = "reads"\n'
# Imported by root: another user may not be able to enter the folder of Python itself.
PRELOAD = ["tests.kit.runners_for_tests", "runners.data.sources", "encodings.utf_8_sig"]
READS += f"[environments.reads]\npreload = {json.dumps(PRELOAD)}\n"
TOKEN = "tok-0123456789"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


def reads(path: str | Path) -> dict[str, object]:
    return {"taskType": "reads", "data": {"type": "csv", "path": str(path), "column": "text"}}


@pytest.fixture(params=[None, "nobody"])
def node(request: pytest.FixtureRequest, server: RedisServer) -> Iterator[Node]:
    if request.param is not None and os.geteuid() != 0:
        pytest.skip("needs root")
    config = READS + (f'[processes]\ntask_user = "{request.param}"\n' if request.param else "")
    home = short_dir()
    home.chmod(0o755)
    made = Node(
        server, "--set", "tasks.read_roots=", worker_id=f"w-{request.param}", config=config, home=home,
        env={"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": "http://127.0.0.1:9"},
    ).start()  # fmt: skip
    yield made
    made.close()


def test_a_document_reads_no_secret_of_the_node(node: Node, server: RedisServer) -> None:
    orchestrator = Orchestrator(server)
    (node.results_dir / "rows.csv").write_text("text\nmine\n")
    read = orchestrator.run(node.worker_id, reads(node.results_dir / "rows.csv"))
    assert read["type"] == "TASK_SUCCEEDED", read.get("error")
    (node.results_dir / "link.csv").symlink_to(f"/proc/{node.pid}/environ")
    secrets = [f"/proc/{node.pid}/environ", f"/proc/{node.pid}/root/proc/1/environ", "/dev/fd/0", "/run/secrets"]
    for path in (*secrets, "/etc/shadow", node.results_dir / "link.csv", node.state_dir / "journal.sqlite"):
        end = orchestrator.run(node.worker_id, reads(path))
        assert end["type"] == "TASK_FAILED", path
        assert end["payload"]["error_kind"] == "bad_request", end["error"]
        responses = (node.results_dir / end["task_id"] / "responses.json").read_text()
        assert TOKEN not in json.dumps(end) + responses
        assert "root:" not in json.dumps(end) + responses
    orchestrator.close()


def test_run_reads_the_documents_folder_and_what_the_user_opens() -> None:
    place = short_dir()
    try:
        for name in ("project", "other", "tmp"):
            (place / name).mkdir()
            (place / name / "rows.csv").write_text("text\nmine\n")
        (place / "node.toml").write_text(READS)
        for name, path in (("own", "rows.csv"), ("other", "../other/rows.csv")):
            spec = reads(place / "project" / path)
            (place / "project" / f"{name}.json").write_text(json.dumps({"spec": spec}))

        def run(name: str, *more: str) -> tuple[int, str]:
            ended = subprocess.run(
                [sys.executable, "-m", "flowmesh.cli.main", "run", "--config", str(place / "node.toml"),
                 "--results-dir", str(place / "results"), *more, str(place / "project" / name)],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp")},
                capture_output=True, text=True, timeout=100, check=False,
            )  # fmt: skip
            return ended.returncode, ended.stdout + ended.stderr

        assert run("own.json")[0] == 0
        code, text = run("other.json")
        assert code != 0
        assert "--read-root" in text
        assert run("other.json", "--read-root", str(place / "other"))[0] == 0
    finally:
        shutil.rmtree(place)
