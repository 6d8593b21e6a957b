"""Disks that are not as they should be when a node starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowmesh.node.folder_check import ACCEPT_FILE, CheckedFolder, mount_of
from tests.kit.support import Node, Orchestrator, RedisServer, until
from tests.process.test_node_faults import needs_root, on_tmpfs, reason_of, remount


def test_a_folder_whose_file_system_is_not_mounted_any_more(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    results = mount / "results"
    results.mkdir(parents=True)
    folder = CheckedFolder("results.dir", results, mount)
    for _ in range(2):
        assert f"mounted at {mount}, which is not mounted; mount it again, or make the file" in folder.trouble()
    (results / ACCEPT_FILE).touch()
    assert folder.trouble(write=True) == ""
    assert os.listdir(results) == []
    assert folder.mount == mount_of(tmp_path)


def test_a_link_to_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    folder = CheckedFolder("results.dir", link)
    (tmp_path / "real").rmdir()
    assert folder.trouble(write=True) == ""
    assert (tmp_path / "real").is_dir()


@pytest.mark.redis
@needs_root
def test_results_that_were_unmounted_while_the_node_was_down(
    orchestrator: Orchestrator, redis_server: RedisServer
) -> None:
    with on_tmpfs(redis_server, "results", "size=8m,mode=700") as (node, mount):
        assert orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
        node.kill()
        subprocess.run(["umount", str(mount)], check=True)
        node.start(wait=False)
        node.wait_status("DEGRADED")
        assert "which is not mounted" in reason_of(node)
        task = orchestrator.dispatch("w1", {"taskType": "echo"})
        until(lambda: node.ask(op="status")["queued"] == 1, "it waits")
        assert os.listdir(mount) == [], "nothing is written into the disk below"
        node.kill()
        node.start(wait=False)
        node.wait_status("DEGRADED")
        (mount / ACCEPT_FILE).touch()
        assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
        assert os.listdir(mount) == [task]
        node.wait_status("IDLE")
        node.kill()
        node.start()


@pytest.mark.redis
@needs_root
def test_a_read_only_results_disk_at_the_start_is_tried_again(redis_server: RedisServer) -> None:
    with on_tmpfs(redis_server, "results", "size=24m,mode=700") as (node, mount):
        assert node.stop() == 0
        remount(mount, "ro")
        done = started(node)
        assert done.returncode == 75, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "results.dir" in done.stderr
        assert "read-only file system" in done.stderr
        remount(mount, "rw")
        assert node.start()


def started(node: Node) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowmesh.cli.supervisor", *node.flags(), "--set=node.log_level=ERROR"]
    return subprocess.run(command, cwd=node.cwd, capture_output=True, text=True, check=False, timeout=60)
