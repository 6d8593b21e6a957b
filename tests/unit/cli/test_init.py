"""`flowmesh init`: what it writes works, a second run changes nothing, and a dry run writes nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flowmesh.cli import init_files
from flowmesh.settings.load import load
from tests.kit.paths import ROOT


def flowmesh(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowmesh.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)  # type: ignore[call-overload]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_a_node_of_ones_own(tmp_path: Path) -> None:
    place = tmp_path / "my node"
    done = flowmesh("init", "--prefix", str(place), "--systemd")
    assert done.returncode == 0, done.stderr
    assert set(files(place)) == {
        "flowmesh-supervisor.service", "node.env", "node.toml", "results", "state",
    }  # fmt: skip
    assert stat.S_IMODE((place / "node.env").stat().st_mode) == 0o600
    settings = load(place / "node.toml", {}).settings
    assert (settings.results.dir, settings.node.state_dir) == (str(place / "results"), str(place / "state"))
    assert settings.processes.task_user is None
    unit = (place / "flowmesh-supervisor.service").read_text()
    assert f"\nExecStart={init_files.program()} --config {place}/node.toml\n" in unit
    assert f"\nEnvironmentFile=-{place}/node.env\n" in unit
    assert "\nUser=" in unit
    assert "next:" in done.stdout
    before = files(place)
    again = flowmesh("init", "--prefix", str(place), "--systemd")
    assert again.returncode == 0
    assert files(place) == before
    assert "made" not in again.stdout.split()


def test_what_was_edited_is_kept_and_said(tmp_path: Path) -> None:
    flowmesh("init", "--prefix", str(tmp_path))
    (tmp_path / "node.toml").write_text("[node]\ntags = ['mine']\n")
    (tmp_path / "node.env").unlink()
    done = flowmesh("init", "--prefix", str(tmp_path))
    assert (tmp_path / "node.toml").read_text() == "[node]\ntags = ['mine']\n"
    assert f"kept  {tmp_path}/node.toml (differs from what this version would write)" in done.stdout
    assert f"made  {tmp_path}/node.env (0600)" in done.stdout


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = flowmesh("init", "--prefix", str(tmp_path / "new"), "--supervisord", "--dry-run")
    assert done.returncode == 0
    assert f"would make {tmp_path}/new/flowmesh.conf (0644)" in done.stdout
    assert files(tmp_path) == {}


def test_a_section_for_supervisord(tmp_path: Path) -> None:
    flowmesh("init", "--prefix", str(tmp_path), "--supervisord")
    section = (tmp_path / "flowmesh.conf").read_text()
    assert f"\ncommand={init_files.program()} --config {tmp_path}/node.toml\n" in section
    assert f'\nenvironment=STATE_DIRECTORY="{tmp_path}/state"\n' in section


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prefix", "FILE/x"], 78, "FILE/x: cannot be made: not a directory; use another --prefix, or sudo"),
        (["--prefix", "HERE", "--user", "x"], 2, "--user: only a node of the whole machine has a user for tasks"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    (tmp_path / "file").touch()
    filled = [word.replace("FILE", str(tmp_path / "file")).replace("HERE", str(tmp_path)) for word in words]
    done = flowmesh("init", *filled)
    assert done.returncode == code
    assert said.replace("FILE", str(tmp_path / "file")).lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sets up a node of the whole machine")
def test_a_node_of_the_whole_machine(tmp_path: Path) -> None:
    """In a mount namespace with folders of its own in the place of /etc and /var/lib."""
    if shutil.which("useradd") is None:
        pytest.skip("useradd is missing (Debian: passwd)")
    etc, var = tmp_path / "etc", tmp_path / "var"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    var.mkdir()
    script = (
        f"mount --bind {etc} /etc && mount --bind {var} /var/lib && "
        f"{sys.executable} -m flowmesh.cli.main init --systemd --user fm-tasks && "
        f"{sys.executable} -m flowmesh.cli.supervisor --check --config /etc/flowmesh/node.toml"
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if "Operation not permitted" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fm-tasks:" in (etc / "passwd").read_text()
    assert "fm-tasks:" not in Path("/etc/passwd").read_text()
    assert 'task_user = "fm-tasks"' in (etc / "flowmesh" / "node.toml").read_text()
    assert "\nUser=" not in (etc / "systemd/system/flowmesh-supervisor.service").read_text()
    assert "tasks run as fm-tasks, apart from the node" in done.stdout
    home = var / "flowmesh" / "home"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert home.stat().st_uid != 0
