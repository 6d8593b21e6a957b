"""On a real Slurm: `flowmesh scale` brings nodes while tasks wait; a signal makes them save checkpoints and exit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.client import Client
from tests.kit.paths import CONF, ROOT
from tests.kit.slurm import Slurm, text_of
from tests.kit.support import RedisServer, until

pytestmark = pytest.mark.redis
BATCH = CONF / "slurm" / "flowmesh-node.sbatch"


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    started = Slurm()
    try:
        yield started
    finally:
        print(text_of(started.jobs)[-4000:])
        started.close()


def test_nodes_come_with_the_queue_and_go_with_a_checkpoint(
    slurm: Slurm, redis_server: RedisServer, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    supervisor = programs / "flowmesh-supervisor"
    supervisor.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m flowmesh.cli.supervisor "$@"\n')
    supervisor.chmod(0o755)
    (tmp_path / "node.toml").write_text("[processes]\nwarm_max_mb = 0\n")
    env = {
        **slurm.env,
        "PYTHONPATH": str(ROOT),
        "REDIS_URL": redis_server.url,
        "FLOWMESH_BIN": str(programs),
        "FLOWMESH_CONFIG": str(tmp_path / "node.toml"),
        "FLOWMESH_STATE": str(slurm.folder / "n"),
    }

    def scale(*args: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "flowmesh.cli.main", "scale", "--slurm", "--once", "--json", "--max", "1"]
        return dict(json.loads(slurm.run(*command, *args, "--script", str(BATCH), env=env)))

    with Client(redis_server.url) as client:
        long, _ = [client.queue(_echo(delaySec=300), anyway=True) for _ in range(2)]
        assert (scale("--dry-run")["wanted"], slurm.run("squeue", "--noheader")) == (1, "")
        found = scale()
        (job,) = found["submitted"]
        assert (found["waiting"], scale()["submitted"]) == (2, []), "never more than --max"
        until(lambda: (state := client.state(long.task_id)) and state.state == "running", "it runs")
        assert client.state(long.task_id).worker_id == f"slurm-{job}-0"  # type: ignore[union-attr]
        assert scale()["busy"] == 1
        slurm.run("scancel", "--signal=USR1", job)
        until(lambda: slurm.state(job)["JobState"] == "COMPLETED", "the job ends")
        assert slurm.state(job)["ExitCode"] == "0:0"
        attempt = client.attempts(long.task_id)[-1]
        assert attempt.error_kind == "drained"
    assert "the node ends at" in text_of(slurm.jobs), "from squeue, where Slurm has no SLURM_JOB_END_TIME"


def _echo(**spec: Any) -> dict[str, Any]:
    return {"kind": "Task", "spec": {"taskType": "echo", **spec}}
