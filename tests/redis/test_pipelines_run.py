"""`flowmesh run` of pipelines on one temporary node: every example as it is, going on, and Ctrl-C."""

import contextlib
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.kit.paths import ROOT
from tests.kit.results_server import ResultsServer
from tests.kit.support import short_dir

pytestmark = pytest.mark.redis
EXAMPLES = sorted((ROOT / "conf/tasks/pipelines").glob("*.yaml"))
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PIPELINE = """
metadata: {name: demo}
spec:
  taskType: echo
  graph:
    nodes:
      - {name: one, spec: {text: "hello ${HOME}"}}
      - {name: two, dependsOn: one, spec: {got: "${one.result.echo.text}", number: "${one.result.resources.swept}"}}
      - {name: long-name-of-a-stage-that-runs, dependsOn: one, spec: {delaySec: 600}}
      - {name: beside, dependsOn: one, spec: {delaySec: 600}}
      - {name: last, dependsOn: long-name-of-a-stage-that-runs}
"""


@pytest.fixture
def place():
    folder = short_dir()
    (folder / "tmp").mkdir()
    yield folder
    shutil.rmtree(folder)


def start(place, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place / "tmp"), "XDG_STATE_HOME": str(place / "xdg")}
    return subprocess.Popen(
        [sys.executable, "-m", "flowmesh.cli.main", "run", "--results-dir", str(place / "r"), *arguments],
        cwd=place,
        env={**env, **options.pop("env", {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the training extra")
@pytest.mark.timeout(600)
def test_every_example_runs_as_it_is(place):
    """And one as between machines: the model of the first stage comes by its URL."""
    text = (ROOT / "conf/tasks/pipelines/sft-inference.yaml").read_text()
    (place / "files").mkdir()
    with ResultsServer(place / "files") as server:
        load = 'load: {type: local, path: "${train.result.final_model_path}"}'
        by_url = text.replace(load, 'load: {type: http, url: "${train.result.final_model_archive_url}"}')
        output = f"  output: {{destination: {{type: http, url: '{server.origin}/api/v1/results'}}}}\n"
        by_url = by_url.replace("  stages:\n", f"{output}  stages:\n")
        (place / "by-url.yaml").write_text(by_url)
        process = start(place, "--keep-going", "--json", *map(str, EXAMPLES), "by-url.yaml")
        out, err = process.communicate(timeout=580)
    results = {
        each["source"].rpartition("/")[2].removesuffix(".yaml"): each for each in map(json.loads, out.splitlines())
    }
    assert process.returncode == 0, (err, [each["stages"] for each in results.values() if not each["ok"]])
    assert set(results) == {path.stem for path in EXAMPLES} | {"by-url"}

    def result(pipeline, stage):
        return results[pipeline]["stages"][stage]["result"]

    assert all(stage["state"] == "succeeded" for each in results.values() for stage in each["stages"].values())
    assert result("branches", "benefits")["items"][0]["output"] in result("branches", "synthesis")["items"][0]["prompt"]
    assert result("branches", "challenges")["items"][0]["prompt"] == "What is hard about a queue?"
    merged = results["branches"]["stages"]["challenges"]
    assert json.loads((place / "r" / merged["task_ids"][0] / "responses.json").read_text())["ok"] is True
    assert result("chain", "format")["echo"]["answer"]["text"] == result("chain", "refine")["items"][0]["output"]
    report = result("dpo-report", "report")["echo"]["report"]
    assert report["rows"] == 2
    assert report["text"] == f"Trained on 2 preferences: {result('dpo-report', 'align')['final_model_path']}"
    rows = result("sharded", "answers")["items"]
    assert [row["prompt"] for row in rows] == ["one", "two", "three", "four", "five", "six", "seven"]
    assert [row["index"] for row in rows] == list(range(7))
    assert result("sharded", "count")["echo"]["last"] == rows[6]["output"]
    assert result("datasets", "compare")["echo"]["warm"] == result("datasets", "ask.1")["items"][0]["output"]
    assert result("by-url", "train")["final_model_archive_url"].startswith(server.origin)
    assert result("by-url", "ask")["items"][0]["output"] == result("sft-inference", "ask")["items"][0]["output"]
    assert len(server.results) == 2
    for pipeline, stage in (("sft-inference", "ask"), ("lora-inference", "answer")):
        assert len(result(pipeline, stage)["items"]) == 1


def test_ctrl_c_ends_all_of_it_and_the_next_run_goes_on(place):
    (place / "p.yaml").write_text(PIPELINE)
    (place / "two.toml").write_text('[[slots]]\nname = "a"\n[[slots]]\nname = "b"\n')
    near, far = pty.openpty()
    os.set_blocking(near, False)
    process = start(
        place, "--config", "two.toml", "--task-id", "demo", "p.yaml", stdout=far, env={"TERM": "xterm", "COLUMNS": "80"}
    )
    os.close(far)
    seen = ""

    def read():
        with contextlib.suppress(OSError):
            return ESCAPE.sub("", os.read(near, 65536).decode(errors="replace"))
        return ""

    deadline = time.monotonic() + 60
    while not re.search(r"long-name-of-a-stage-that-runs +running[^\n]+\n *last[^\n]+\n *beside +running", seen):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
        seen += read()
    assert re.search(r"two +failed", seen)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, (seen, err)
    out = ""
    while more := read():
        out += more
    lines = out.replace("\r", "").splitlines()
    assert all(len(line) <= 80 for line in lines[-6:-1])
    assert [line.split()[:2] for line in lines[-6:-1]] == [
        ["one", "succeeded"],
        ["two", "failed"],
        ["long-name-of-a-stage-that-runs", "cancelled"],
        ["last", "cancelled"],
        ["beside", "cancelled"],
    ]
    assert "run it again with --task-id demo to go on" in err
    error = json.loads((place / "r/demo/responses.json").read_text())["stages"]["two"]["error"]
    assert error.startswith(
        "spec.graph.nodes[1].spec.number: ${one.result.resources.swept}: one.result.resources has no 'swept'"
    )
    text = PIPELINE.replace("delaySec: 600", "delaySec: 0").replace("resources.swept", "resources.processes_swept")
    (place / "p.yaml").write_text(text)
    process = start(place, "--task-id", "demo", "--json", "p.yaml")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stages = json.loads(out)["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "one": "reused",
        "two": "succeeded",
        "long-name-of-a-stage-that-runs": "succeeded",
        "beside": "succeeded",
        "last": "succeeded",
    }
    assert stages["two"]["result"]["echo"]["got"] == "hello ${HOME}"
    assert stages["two"]["result"]["echo"]["number"] == 0
    assert list((place / "tmp").iterdir()) == []
