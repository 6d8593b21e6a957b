"""Installs the wheels that this machine lacks into a folder, without an index. Needs only the standard library and pip.

What is here in a version that fits stays as it is: above all torch and what belongs to it.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

TIMEOUT_S = 120


class SetUpError(Exception):
    """Raised when the run cannot begin: the wheels cannot be installed, or a dry run's stub cannot be built."""


def requirements(root: Path) -> dict[str, Requirement]:
    """What the base install asks of other packages, by name."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(each.name): each for each in map(Requirement, project["dependencies"])}


def lacking(wheels: list[Path], wanted: dict[str, Requirement]) -> list[Path]:
    """The wheels whose package is missing here, or is here in a version that the node does not take."""
    found = []
    for wheel in wheels:
        name = parse_wheel_filename(wheel.name)[0]
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(wheel)
            continue
        if name in wanted and not wanted[name].specifier.contains(here, prereleases=True):
            found.append(wheel)
    return found


def install(root: Path, wheels: Path, target: Path) -> str:
    """
    Returns:
        what was installed, in a line.

    Raises:
        SetUpError: pip failed.
    """
    chosen = lacking(sorted(wheels.glob("*.whl")), requirements(root)) if wheels.is_dir() else []
    if not chosen:
        return "nothing: all is here" if wheels.is_dir() else f"nothing: there is no folder {wheels.name} with wheels"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--root-user-action", "ignore"]
    command += ["--target", str(target), *map(str, chosen)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SetUpError(f"pip did not end within {TIMEOUT_S} s") from None
    if done.returncode:
        raise SetUpError(f"pip ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return ", ".join("==".join(map(str, parse_wheel_filename(wheel.name)[:2])) for wheel in chosen)
