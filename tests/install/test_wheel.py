"""The wheel in a fresh environment and an empty folder: the README's commands, an agent, the remedies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.redis]
TRIED = re.compile(r"<!-- tried:[^>]*-->\n```console\n(.*?)```", re.DOTALL)


class Place:
    """An empty folder, and an environment with nothing but the wheel in it."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.wheels = folder / "wheels"
        self.bin = folder / "venv" / "bin"
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        self._done([*pip, "wheel", "--no-deps", "--wheel-dir", str(self.wheels), str(ROOT)], cwd=folder)
        (self.wheel,) = self.wheels.glob("*.whl")
        self._done([sys.executable, "-m", "venv", str(folder / "venv")], cwd=folder)
        before = self._size(folder)
        self.install(str(self.wheel))
        self.base_bytes = self._size(folder) - before
        self.install(f"{self.wheel}[embedded]")

    def install(self, what: str) -> None:
        pip = [f"{self.bin}/python", "-m", "pip", "-q", "--disable-pip-version-check"]
        self._done([*pip, "install", "--no-compile", what], cwd=self.home)

    def _size(self, folder: Path) -> int:
        files = (path for path in (folder / "venv").rglob("*") if path.is_file() and path.suffix != ".pyc")
        return sum(path.stat().st_size for path in files)

    def shell(self, command: str, code: int = 0) -> str:
        """What a command prints, stdout and stderr together."""
        kept = ("LANG", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE", "PIP_TRUSTED_HOST")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env |= {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PIP_CACHE_DIR": str(self.home / "pip"),
        }
        return self._done(["bash", "-c", command], cwd=self.home, env=env, code=code)

    def _done(self, command: list[str], cwd: Path, env: dict[str, str] | None = None, code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("wheel"))


def test_the_readmes_commands_work(place: Place) -> None:
    blocks = TRIED.findall((ROOT / "README.md").read_text())
    commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 4, "the README has a block that is tried"
    for command in commands:
        # doctor finds no Redis here, which it calls broken
        code = 1 if command.startswith("flowmesh doctor") else 0
        said = place.shell(command, code)
        assert "Traceback" not in said
        if code == 1:
            broken = [line for line in said.splitlines() if line.strip().startswith("broken")]
            assert len(broken) == 1, said
            assert "redis" in broken[0].lower(), said


def test_what_is_missing_is_installed_by_the_remedy(place: Place) -> None:
    """The wheel is in no index: a remedy that names it by its name alone would fail."""
    said = place.shell("flowmesh examples inference-transformers > i.yaml && flowmesh run i.yaml", 1)
    remedy = re.search(r"\S+ -m pip install '[^']+\[inference\]'", said)
    assert remedy is not None, said
    assert f"'{place.wheel}[inference]'" in remedy[0]
    place.shell(f"{remedy[0]} --dry-run -q --no-deps")


def test_agents_have_their_configurations(place: Place) -> None:
    place.install(f"{place.wheel}[agent]")
    place.shell("flowmesh examples agent-simple > agent.yaml")
    said = place.shell("flowmesh run agent.yaml")
    assert "succeeded" in said


def test_the_other_name_of_the_command(place: Place) -> None:
    assert place.shell("flowmesh-node --version") == place.shell("flowmesh --version")
    version = place.wheel.name.split("-")[1]  # by the tags of the repository that it was built from
    assert re.match(r"\d+\.\d+", version)
    assert place.shell("flowmesh --version") == f"flowmesh {version}\n"


def test_the_base_install_is_light(place: Place) -> None:
    assert place.base_bytes < 30_000_000, f"{place.base_bytes / 1e6:.1f} MB"
