"""What is said of this installation: version, the remedy that installs an extra, other owners of the name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.paths import CONF, ROOT

WHEEL = "https://files.example/flowmesh_supervisor-1-py3-none-any.whl"


def dist(
    folder: Path, name: str = "flowmesh-supervisor", *, files: str = "", commands: str = "", direct: Any = None
) -> None:
    """An installed distribution, as pip leaves it."""
    for line in files.splitlines():
        path = folder / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    info = folder / f"{name.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    (info / "RECORD").write_text(files)
    if commands:
        (info / "entry_points.txt").write_text(f"[console_scripts]\n{commands}\n")
    if direct is not None:
        (info / "direct_url.json").write_text(direct if isinstance(direct, str) else json.dumps(direct))


def ask(folder: Path, expression: str, package: Path = ROOT) -> str:
    """The value in an interpreter that finds this program in `package` and distributions in `folder` only."""
    script = (
        f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path[:0] = [{str(package)!r}]\nfrom flowmesh import installed\n"
        f"sys.path[:] = [{str(folder)!r}, *(p for p in sys.path if p != {str(package)!r})]\nprint({expression})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    ("direct", "said"),
    [
        (None, "'flowmesh-supervisor[rag]'"),
        ({"url": "file://HERE", "dir_info": {"editable": True}}, "-e 'HERE[rag]'"),
        ({"url": "file://HERE", "dir_info": {}}, "'HERE[rag]'"),
        ({"url": "file://HERE/a%20wheel.whl", "archive_info": {}}, "'HERE/a wheel.whl[rag]'"),
        ({"url": "file:///gone/a.whl", "archive_info": {}}, "'flowmesh-supervisor[rag]'"),
        ({"url": WHEEL, "archive_info": {}}, f"'flowmesh-supervisor[rag] @ {WHEEL}'"),
        (
            {"url": "https://git.example/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'flowmesh-supervisor[rag] @ git+https://git.example/x.git@abc'",
        ),
        ("not JSON", "'flowmesh-supervisor[rag]'"),
    ],
)
def test_a_remedy_installs_from_where_this_copy_came_from(tmp_path: Path, direct: Any, said: str) -> None:
    (tmp_path / "a wheel.whl").touch()
    text = direct if isinstance(direct, str) else json.dumps(direct).replace("HERE", str(tmp_path))
    dist(tmp_path, direct=None if direct is None else text)
    command = ask(tmp_path, "installed.install_command('rag')")
    assert command == f"{sys.executable} -m pip install {said.replace('HERE', str(tmp_path))}"
    assert ask(tmp_path, "installed.install_command('rag', '/opt/vllm/bin/python')").startswith(
        "/opt/vllm/bin/python -m "
    )


def test_the_version_is_the_distributions(tmp_path: Path) -> None:
    dist(tmp_path)
    dist(tmp_path, "flowmesh")
    assert ask(tmp_path, "installed.version()") == "1.2.3"
    assert ask(tmp_path / "empty", "installed.version()") == "unknown"


def test_who_else_owns_the_name(tmp_path: Path) -> None:
    dist(tmp_path, files="flowmesh/__init__.py,,\n", commands="flowmesh = flowmesh.cli.main:main")
    dist(tmp_path, "other", files="other/flowmesh/__init__.py,,\nother/x.py,,\n", commands="flowmesh-x = a:b")
    assert ask(tmp_path, "installed.other_owners()") == "[]"
    dist(tmp_path, "flowmesh", files="flowmesh/__init__.py,,\n")
    dist(tmp_path, "commander", commands="flowmesh = commander:main")
    assert ask(tmp_path, "installed.other_owners()") == "['commander', 'flowmesh']"


@pytest.mark.parametrize("init", ["'''Somebody else's.'''\n__version__ = '9.9'\n", None])
def test_a_package_that_somebody_else_overwrote_or_removed_still_says_so(tmp_path: Path, init: str | None) -> None:
    package = tmp_path / "code"
    (package / "flowmesh").mkdir(parents=True)
    (package / "flowmesh" / "installed.py").write_text((ROOT / "flowmesh" / "installed.py").read_text())
    if init is not None:
        (package / "flowmesh" / "__init__.py").write_text(init)
    dist(tmp_path)
    said = ask(tmp_path, "installed.problem()", package)
    assert "another distribution has overwritten or removed files of flowmesh-supervisor" in said
    assert said.endswith("-m pip install --force-reinstall --no-deps flowmesh-supervisor")
    assert ask(tmp_path, "installed.problem()") == ""
    assert ask(tmp_path, "installed.version()", package) == "1.2.3"


def test_the_configuration_files_are_in_the_package() -> None:
    from flowmesh import installed

    names = {path.relative_to(CONF) for path in CONF.rglob("*") if path.is_file()}
    assert {path.relative_to(installed.conf()) for path in installed.conf().rglob("*") if path.is_file()} == names
    assert Path("node.toml") in names
