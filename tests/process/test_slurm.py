"""On a real Slurm: `flowmesh scale` brings nodes while tasks wait; each end of a job saves checkpoints before it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.cli.control import Control
from flowmesh.client import Client, TaskState
from tests.kit.paths import CONF, ROOT
from tests.kit.slurm import Slurm, text_of
from tests.kit.support import RedisServer, until

pytestmark = pytest.mark.redis
BATCH = CONF / "slurm" / "flowmesh-node.sbatch"
CONFIG = """
[node]
ends_margin_s = 20

[processes]
warm_max_mb = 0

[task_types.sft]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""


class Cluster:
    """A Slurm whose jobs are nodes, on one Redis; `sft` tasks save a checkpoint only when they are asked to."""

    def __init__(self, folder: Path) -> None:
        self.slurm, self.redis = Slurm(), RedisServer()
        self.client = Client(self.redis.url)
        self.results = folder / "results"
        supervisor = folder / "flowmesh-supervisor"
        supervisor.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m flowmesh.cli.supervisor "$@"\n')
        supervisor.chmod(0o755)
        (folder / "node.toml").write_text(CONFIG)
        self.env = {
            **self.slurm.env,
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": self.redis.url,
            "RESULTS_DIR": str(self.results),
            "FLOWMESH_BIN": str(folder),
            "FLOWMESH_CONFIG": str(folder / "node.toml"),
            "TMPDIR": str(self.slurm.folder),
        }

    def close(self) -> None:
        print(text_of(self.slurm.jobs)[-4000:])
        self.slurm.close()
        self.client.close()
        self.redis.close()

    def submit(self, *options: str) -> str:
        return self.slurm.run("sbatch", "--parsable", *options, env=self.env).strip()

    def train(self) -> str:
        return self.client.queue(task("sft", do="checkpoint"), anyway=True).task_id

    def saved(self, task_id: str) -> bool:
        return (self.results / task_id / "checkpoints" / "last").exists()

    def wait_working(self, job: str, task_id: str, attempt: int = 1) -> TaskState:
        """Until this job's node runs it, and it would save a checkpoint."""

        def works() -> TaskState | None:
            found = self.client.state(task_id)
            if found is None or (found.state, found.attempt) != ("running", attempt):
                return None
            with Control(self.slurm.folder / f"flowmesh-{job}" / "0") as node:
                phases = {each.task_id: each.phase for each in node.status().tasks}
            return found if phases.get(task_id) == "work" else None

        return until(works, f"job {job} runs {task_id}")

    def wait_completed(self, job: str) -> None:
        self.slurm.wait_state(job, "COMPLETED")
        assert self.slurm.state(job)["ExitCode"] == "0:0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield started
    finally:
        started.close()


def test_nodes_come_with_the_queue_and_go_with_a_checkpoint(cluster: Cluster) -> None:
    slurm, client = cluster.slurm, cluster.client

    def scale(*args: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "flowmesh.cli.main", "scale", "--slurm", "--once", "--json", "--max", "1"]
        return dict(json.loads(slurm.run(*command, *args, "--script", str(BATCH), env=cluster.env)))

    long, other = [client.queue(task("echo", delaySec=300), anyway=True) for _ in range(2)]
    assert (scale("--dry-run")["wanted"], slurm.run("squeue", "--noheader")) == (1, "")
    found = scale()
    (job,) = found["submitted"]
    assert (found["waiting"], scale()["submitted"]) == (2, []), "never more than --max"
    until(lambda: (state := client.state(long.task_id)) and state.state == "running", "it runs")
    assert client.state(long.task_id).worker_id == f"slurm-{job}-0"  # type: ignore[union-attr]
    assert scale()["busy"] == 1
    slurm.run("scancel", "--signal=USR1", job)
    cluster.wait_completed(job)
    assert client.attempts(long.task_id)[-1].error_kind == "drained"
    assert "the node ends at" in text_of(slurm.jobs), "from squeue, where Slurm has no SLURM_JOB_END_TIME"
    for each in (long, other):
        client.cancel(each.task_id)


def test_a_checkpoint_is_saved_before_a_time_limit_a_requeue_and_a_preemption(cluster: Cluster) -> None:
    slurm, client = cluster.slurm, cluster.client
    short = cluster.submit("--job-name=short", "--time=1", "--signal=USR1@0", str(BATCH))
    ending = cluster.train()
    cluster.wait_working(short, ending)
    endless = cluster.submit("--job-name=endless", "--time=UNLIMITED", str(BATCH))
    kept = cluster.train()
    first = cluster.wait_working(endless, kept)
    behind = cluster.train()

    slurm.run("scontrol", "requeue", endless)
    slurm.wait_state(endless, "PENDING")
    assert (client.attempts(kept)[-1].error_kind, cluster.saved(kept)) == ("drained", True)
    slurm.run("scontrol", "update", f"JobId={endless}", "StartTime=now")
    again = cluster.wait_working(endless, kept, attempt=2)
    assert (again.worker_id, again.failures, slurm.state(endless)["Restarts"]) == (first.worker_id, 0, "1")
    assert client.state(behind).state == "queued", "what came back is first"  # type: ignore[union-attr]

    until(lambda: cluster.saved(ending), "the job with a time limit saves a checkpoint")
    cluster.wait_completed(short)
    assert client.attempts(ending)[-1].error_kind == "drained"

    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=true").strip()
    cluster.wait_completed(endless)
    cluster.wait_completed(urgent)
    attempt = client.attempts(kept)[-1]
    assert (attempt.attempt, attempt.error_kind, client.state(kept).failures) == (2, "drained", 0)  # type: ignore[union-attr]


def task(task_type: str, **spec: Any) -> dict[str, Any]:
    return {"kind": "Task", "spec": {"taskType": task_type, **spec}}
