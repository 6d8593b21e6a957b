"""The container files: built where there is a builder, else read as it would read them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowmesh.cli.main import COMMANDS
from flowmesh.cli.supervisor import command
from flowmesh.settings.load import load
from tests.kit.paths import CONF, ROOT

FOLDER = CONF / "container"
INSTRUCTIONS = {"FROM", "ARG", "RUN", "COPY", "ENV", "WORKDIR", "VOLUME", "STOPSIGNAL", "HEALTHCHECK", "CMD"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (FOLDER / "Containerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_instructions_can_be_followed() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], check=False).returncode == 0, rest
    arguments = dict(rest.partition("=")[::2] for name, rest in found if name == "ARG")
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    (constraints,) = re.findall(r"-c /src/(\S+)", " ".join(rest for _, rest in found))
    assert (ROOT / constraints).is_file()


def test_what_it_runs_is_there() -> None:
    """Commands, options and settings, as this version has them."""
    by_name = dict(instructions())
    start = json.loads(by_name["CMD"])
    check = json.loads(by_name["HEALTHCHECK"].partition("CMD ")[2])
    assert {start[0], check[0]} <= set(PROJECT["scripts"])
    assert check[1] in COMMANDS
    context = command.make_context(start[0], start[1:], resilient_parsing=True)
    (assignment,) = context.params["sets"]
    key, _, value = assignment.partition("=")
    settings = load(None, {"REDIS_URL": "redis://redis:6379/0"}, {key: value}).settings
    assert settings.processes.task_user == "flowmesh"
    assert (
        f"useradd --system --home-dir /var/lib/flowmesh/home --create-home --shell /usr/sbin/nologin {value}"
        in " ".join(rest for name, rest in instructions() if name == "RUN")
    )


def test_the_composition_fits_the_node() -> None:
    composed: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    node = composed["services"]["node"]
    assert (FOLDER / node["build"]["context"] / node["build"]["dockerfile"]).resolve() == FOLDER / "Containerfile"
    settings = load(None, node["environment"]).settings
    assert int(node["stop_grace_period"].removesuffix("s")) > settings.processes.drain_timeout_s
    assert set(node["depends_on"]) <= set(composed["services"])
    assert node["volumes"][0].partition(":")[0] in composed["volumes"]


@pytest.mark.slow
def test_it_builds(tmp_path: Path) -> None:
    builder = next(filter(None, map(shutil.which, ("podman", "docker", "buildah"))), None)
    if builder is None:
        pytest.skip("no podman, docker or buildah: the image is not built here")
    base = dict(instructions())["FROM"]
    pulled = subprocess.run([builder, "pull", base], capture_output=True, text=True, check=False)
    if pulled.returncode != 0:
        pytest.skip(f"{builder} cannot fetch {base}: {pulled.stderr.strip().splitlines()[-1:]}")
    build = [
        builder,
        "build",
        "-f",
        str(FOLDER / "Containerfile"),
        "--build-arg",
        "EXTRAS=archive",
        "-t",
        "flowmesh-test",
    ]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(build)}:\n{done.stdout}{done.stderr}"
