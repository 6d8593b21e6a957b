"""The systemd unit's restrictions: a node works with the rights that it leaves, and files are not everybody's."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.http_server import Server
from tests.kit.paths import CONF
from tests.kit.support import ROOT, Orchestrator, until

UNIT = CONF / "flowmesh-supervisor.service"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root's rights")


def service() -> dict[str, str]:
    """The [Service] section; where a key stands twice, its values are joined."""
    joined: dict[str, str] = {}
    for line in UNIT.read_text().partition("[Service]")[2].splitlines():
        if match := re.match(r"(\w+)=(.*)", line):
            joined[match[1]] = f"{joined.get(match[1], '')} {match[2]}".strip()
    return joined


def with_the_units_rights() -> list[str]:
    """A command that gives up what the unit takes away: capabilities, and new privileges by set-uid programs."""
    kept = [f"+{name.removeprefix('CAP_').lower()}" for name in service()["CapabilityBoundingSet"].split()]
    assert service()["NoNewPrivileges"] == "yes"
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is missing (Debian: util-linux)")
    return [setpriv, "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{','.join(kept)}"]


@as_root
@pytest.mark.redis
def test_a_node_works_with_the_units_rights(orchestrator: Orchestrator, make_node: Any) -> None:
    with Server() as server:
        node = make_node(start=False, config='[processes]\ntask_user = "nobody"\n')
        node.home.chmod(0o755)  # so that the task user reaches the folders in it
        node.wrapper = with_the_units_rights()
        node.start()
        assert "tasks run as nobody, apart from the node" in node.text()
        plain = orchestrator.run("w1", {"taskType": "echo"})
        assert plain["type"] == "TASK_SUCCEEDED", plain["payload"]
        destination = {"type": "http", "url": server.url + "/r"}
        sent = orchestrator.run("w1", {"taskType": "echo", "output": {"destination": destination}})
        assert sent["type"] == "TASK_SUCCEEDED", sent
        asleep = orchestrator.dispatch("w1", {"taskType": "echo", "delaySec": 600})
        orchestrator.wait_started(asleep)
        child = node.task_pid(asleep)
        assert Path(f"/proc/{child}").stat().st_uid != 0
        node.ask(op="cancel", task_id=asleep)
        assert orchestrator.wait_end(asleep)["payload"]["error_kind"] == "cancelled"
        until(lambda: not list((node.state_dir / "tmp").iterdir()), "what the tasks left is removed")


@pytest.mark.redis
@pytest.mark.parametrize(("umask", "folder", "file"), [(None, 0o750, 0o640), ("0022", 0o755, 0o644)])
def test_results_are_for_whom_the_settings_say(
    orchestrator: Orchestrator, make_node: Any, umask: str | None, folder: int, file: int
) -> None:
    node = make_node(config="" if umask is None else f'[results]\numask = "{umask}"\n')
    task = orchestrator.dispatch("w1", {"taskType": "echo"})
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    out = node.results_dir / task
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [out, *out.rglob("*")]}
    assert {modes[name] for name in (task, "logs", "artifacts")} == {folder}
    assert {modes[name] for name in ("responses.json", "manifest.json")} == {file}
    assert stat.S_IMODE(next((out / "logs").glob("*.log")).stat().st_mode) == 0o640, "logs are never everybody's"


def test_the_unit_takes_away_what_is_not_needed() -> None:
    found = service()
    for key in ("NoNewPrivileges", "RestrictSUIDSGID", "ProtectHome", "PrivateTmp", "LockPersonality"):
        assert found[key] == "yes", key
    assert found["ProtectSystem"] == "strict"
    assert "User" not in found, "root with few rights, so that tasks can have a user of their own"
    explained = UNIT.read_text()
    for key in ("PrivateDevices", "ProtectProc", "MemoryDenyWriteExecute", "ProtectKernelTunables"):
        assert key not in found
        assert re.search(rf"^#.*\b{key}\b", explained, re.MULTILINE), f"why {key} is left out"


def test_systemd_calls_the_unit_ok() -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is missing (Debian: systemd)")
    command = [analyze, "security", "--offline=true", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level .*: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze does not rate a file: {done.stderr.strip()}")
    assert float(found[1]) < 5.0, done.stdout


@as_root
def test_the_node_starts_under_systemd(tmp_path: Path) -> None:
    """Under the unit's own restrictions, by a transient service."""
    if not Path("/run/systemd/system").is_dir():
        pytest.skip("systemd does not run this machine")
    restricts = re.compile(
        r"(Private|Protect|Restrict[AGNRS]|SystemCall|Capab|Lock|Keyring|NoNew|UMask|Delegate|OOM|Limit)"
    )
    properties = [f"--property={key}={value}" for key, value in service().items() if restricts.match(key)]
    properties.append(f"--property=ReadWritePaths={tmp_path}")
    command = [sys.executable, "-m", "flowmesh.cli.main", "run", str(CONF / "tasks" / "echo.yaml")]
    done = subprocess.run(
        ["systemd-run", "--wait", "--pipe", "--collect", *properties, f"--working-directory={tmp_path}",
         f"--setenv=PYTHONPATH={ROOT}", *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
