"""The node's metrics: what they count, that Prometheus' own parser reads them, and the files for other exporters."""

from __future__ import annotations

import json
import math
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowmesh.metrics.families import MOST_SERIES, Family, Histogram, text_of
from tests.kit.gpu_node import MakeGpuNode, held
from tests.kit.paths import ROOT
from tests.kit.support import Orchestrator, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, metric: str, **labels: str) -> float:
    return samples[metric, frozenset(labels.items())]


@pytest.mark.redis
def test_a_node_counts_what_its_tasks_did(gpu_node: MakeGpuNode, orchestrator: Orchestrator, tmp_path: Path) -> None:
    textfile, jobs = tmp_path / "flowmesh.prom", tmp_path / "jobs"
    jobs.mkdir()
    config = f'[metrics]\ntextfile = "{textfile}"\njob_mapping_dir = "{jobs}"\ninterval_s = 1\n'
    node = gpu_node(config=config)
    for spec in ({"taskType": "echo"}, {"taskType": "echo"}, {"taskType": "echo", "delaySec": "x"}, {"taskType": "no"}):
        orchestrator.run("w1", spec)
    task_id, _ = held(orchestrator, node)
    until(lambda: (jobs / "0").read_text() == f"{task_id}\n", "the task is named for the first GPU")
    now = parsed(node.ask(op="metrics")["text"])
    assert value(now, "flowmesh_slot_state", worker="w1", slot="main", state="RUNNING") == 1
    assert value(now, "flowmesh_slot_state", worker="w1", slot="main", state="IDLE") == 0
    assert value(now, "flowmesh_tasks", state="running") == 1
    node.let_go(task_id)
    orchestrator.wait_end(task_id)
    until(lambda: (jobs / "0").read_text() == "", "no task is on the first GPU")
    until(lambda: "flowmesh_heartbeat_late_seconds{" in node.ask(op="metrics")["text"], "a heartbeat was sent")
    samples = parsed(node.ask(op="metrics")["text"])
    assert value(samples, "flowmesh_task_exits_total", type="echo", verdict="ok") == 2
    assert value(samples, "flowmesh_task_exits_total", type="none", verdict="bad_request") == 2
    assert value(samples, "flowmesh_task_run_seconds_count", type="look") == 1
    assert value(samples, "flowmesh_fork_seconds_count", type="echo") == 2
    assert value(samples, "flowmesh_task_queue_seconds_bucket", type="echo", le="+Inf") == 2
    assert value(samples, "flowmesh_task_phase_seconds_count", type="look", phase="ready") == 1
    assert value(samples, "flowmesh_gpu_release_seconds_count") == 1
    assert value(samples, "flowmesh_redis_up") == 1
    assert 0 <= value(samples, "flowmesh_heartbeat_late_seconds", worker="w1") < 60
    written = parsed(textfile.read_text())
    assert written.keys() <= samples.keys()
    assert stat.S_IMODE(textfile.stat().st_mode) == 0o644
    if (promtool := shutil.which("promtool")) is not None:
        text = node.ask(op="metrics")["text"]
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    node.stop()
    assert not textfile.exists(), "nobody takes its last values for the present ones"


def test_text_of_odd_values() -> None:
    family = Family("gauge", "a_b", "About it.", ("x",))
    family.set(1.5, 'quote " backslash \\ line \n end')
    family.set(math.inf, "big")
    histogram = Histogram("h_seconds", "Of it.", ("t",), (0.1, 1.0))
    for seconds in (0.1, 0.5, 7.0):
        histogram.observe(seconds, "k")
    samples = parsed(text_of([family, histogram]))
    assert value(samples, "a_b", x='quote " backslash \\ line \n end') == 1.5
    assert value(samples, "a_b", x="big") == math.inf
    counts = [value(samples, "h_seconds_bucket", t="k", le=le) for le in ("0.1", "1", "+Inf")]
    assert counts == [1, 2, 3]
    assert value(samples, "h_seconds_sum", t="k") == 7.6
    assert value(samples, "h_seconds_count", t="k") == 3


def test_names_that_tasks_invent_do_not_fill_the_memory() -> None:
    family = Family("counter", "c_total", "Of it.", ("name",))
    for number in range(3 * MOST_SERIES):
        family.add(str(number))
    samples = parsed(text_of([family]))
    assert len(samples) <= MOST_SERIES + 1
    assert sum(samples.values()) == 3 * MOST_SERIES
    assert value(samples, "c_total", name="other") == 2 * MOST_SERIES


def names_used(text: str) -> set[str]:
    return set(re.findall(r"\bflowmesh_[a-z_]+", text))


def test_rules_and_dashboard_use_metrics_that_there_are() -> None:
    source = (ROOT / "flowmesh/metrics/node_metrics.py").read_text()
    known = names_used(source)
    of_histograms = {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    for file in ("conf/prometheus/flowmesh.rules.yml", "conf/grafana/flowmesh.json"):
        used = names_used((ROOT / file).read_text())
        assert len(used) > 5
        assert used <= known | of_histograms, file
    panels = json.loads((ROOT / "conf/grafana/flowmesh.json").read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    if (promtool := shutil.which("promtool")) is not None:
        command = [promtool, "check", "rules", str(ROOT / "conf/prometheus/flowmesh.rules.yml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
