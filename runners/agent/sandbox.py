"""Runs the commands of agents in the task's folder: confined, with bounds on time, memory, processes, disk and output.

`jail/` confines them. Where the system supports no kind of jail, commands are refused: they could read all files of
the node's user.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from runners.agent.cgroups import Group
from runners.agent.command import Bounds, Command, Ended, NotConfined, stop

JAIL = Path(__file__).with_name("jail") / "main.py"
Mode = Literal["namespaces", "landlock"]
MODES: tuple[Mode, ...] = ("namespaces", "landlock")

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
ETC = (
    "alternatives", "ca-certificates", "ca-certificates.conf", "crypto-policies", "group", "hosts", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf", "passwd", "pki/ca-trust",
    "pki/tls/cert.pem", "pki/tls/certs", "pki/tls/openssl.cnf", "protocols", "resolv.conf", "services",
    "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf",
)  # fmt: skip
"""Not all of `ssl` and `pki`: they also hold private keys."""
OF_PYTHON = ("bin", "include", "lib", "lib64", "libexec", "share", "ssl", "pyvenv.cfg")
"""Parts of a Python's install prefix. It may also hold folders of the node."""
PASSED = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "FLOWMESH_ATTEMPT")
FILE_BYTES = 512 * 2**20
OPEN_FILES = 512
"""Of one process. Also bounds what a user's processes have sent each other and not received."""
JAIL_BYTES, JAIL_TASKS = 64 * 2**20, 8
"""Room in the cgroup for the jail's own processes."""
LOCKED_BYTES = 8 * 2**20
PENDING_SIGNALS = 1024
MEMORY_SHARE = 2
"""A folder is kept in memory if its bound is at most this part of the memory that is available."""
TASKS_A_PROCESS = 16
"""The kernel counts threads, too; its bound only has to stop a fork bomb between two of our counts."""


class Sandbox:
    """One folder and the commands that run in it."""

    def __init__(self, folder: Path, bounds: Bounds, *, mode: Mode | None = None) -> None:
        """
        Args:
            mode: kind of jail; None: the best that works here.

        Raises:
            NotConfined: none works.
        """
        self.folder = folder.resolve()
        self.bounds = bounds
        self.mode = mode or best_mode()
        available = psutil.virtual_memory().available
        self.in_memory = self.mode == "namespaces" and bounds.disk_bytes <= available // MEMORY_SHARE
        self.left: list[str] = []
        """What commands made that was not kept, by path."""
        (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)

    def describe(self) -> dict[str, str]:
        """For the result: which mechanisms confine commands here."""
        if self.bounds.network:
            network = "on"
        else:
            network = "off (network namespace)" if self.mode == "namespaces" else "off (no sockets)"
        processes = "own (pid namespace)"
        if self.mode == "landlock":
            processes = f"the node's (signals {'confined' if signals_confined() else 'refused'})"
        disk = "own (file system of that size)" if self.in_memory else "the folder's (measured)"
        return {
            "files": self.mode,
            "network": network,
            "processes": processes,
            "disk": disk,
            "cgroup": "own" if has_cgroups() else "none",
        }

    def run(self, command: Sequence[str], check: Callable[[], None], *, timeout_s: float | None = None) -> Ended:
        """Run `command` in the folder.

        Args:
            check: called many times a second; what it raises ends the command and is raised again.
            timeout_s: applies if it is less than the bound.

        Raises:
            NotConfined: the jail could not be built.
        """
        limit_s = min(timeout_s or self.bounds.timeout_s, self.bounds.timeout_s)
        group = Group(self._group_bytes, self.bounds.processes * TASKS_A_PROCESS + JAIL_TASKS)
        reading, writing = os.pipe()
        with tempfile.TemporaryDirectory(prefix="jail-") as root, os.fdopen(reading, "rb"):
            try:
                process = self._start(command, root, limit_s, writing, group)
            finally:
                os.close(writing)
            try:
                ended = Command(
                    process, reading, self.folder, self.bounds, limit_s, counts_disk=not self.in_memory,
                    own_network=self.mode == "namespaces" and not self.bounds.network,
                ).until_end(check)  # fmt: skip
                self.left += ended.left
                if group.oom_kills() and not ended.stopped:
                    ended = msgspec.structs.replace(ended, stopped=f"it reached {self._group_bytes} bytes of memory")
                return ended
            finally:
                stop(process)
                group.remove()
                assert process.stdout is not None, "it is a pipe"
                process.stdout.close()

    @property
    def _group_bytes(self) -> int:
        """Limit of the command's cgroup: a hard stop above the bounds that are measured, files in memory included."""
        files = self.bounds.disk_bytes if self.in_memory else 0
        return self.bounds.memory_bytes + files + JAIL_BYTES

    def _start(
        self, command: Sequence[str], root: str, limit_s: float, report: int, group: Group
    ) -> subprocess.Popen[bytes]:
        plan = {
            "mode": self.mode,
            "network": self.bounds.network,
            "root": root,
            "work_dir": str(self.folder),
            "readable": readable_paths(),
            "env": environment(self.folder),
            "tasks": self.bounds.processes * TASKS_A_PROCESS,
            "tasks_of_user": tasks_of_user() if self.mode == "landlock" else 0,
            "disk_bytes": self.bounds.disk_bytes,
            "in_memory": self.in_memory,
            "limits": {
                "RLIMIT_CORE": 0,
                "RLIMIT_DATA": self.bounds.memory_bytes,
                "RLIMIT_FSIZE": min(FILE_BYTES, self.bounds.disk_bytes),
                "RLIMIT_NOFILE": OPEN_FILES,
                "RLIMIT_CPU": int(limit_s * 64) + 60,
                "RLIMIT_MEMLOCK": LOCKED_BYTES,
                "RLIMIT_MSGQUEUE": 0,
                "RLIMIT_SIGPENDING": PENDING_SIGNALS,
            },
            "cgroups": [str(folder) for folder in group.folders],
            "report": report,
        }
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL), json.dumps(plan), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            cwd="/",
            pass_fds=(report,),
        )


@functools.cache
def has_cgroups() -> bool:
    """Whether commands get a cgroup here."""
    group = Group(JAIL_BYTES, JAIL_TASKS)
    found = bool(group.folders)
    group.remove()
    return found


def readable_paths() -> list[str]:
    """Paths of this machine's programs and libraries, and of this Python."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.base_prefix)} - {"/", "/usr"}
    packages = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    paths = [
        *SYSTEM,
        *(f"/etc/{name}" for name in ETC),
        *(f"{root}/{name}" for root in sorted(own) for name in OF_PYTHON),
    ]
    paths += sorted(path for path in packages if not any(path.startswith(f"{shown}/") for shown in paths))
    return [path for path in paths if os.path.lexists(path)]


def environment(folder: Path) -> dict[str, str]:
    """A command's whole environment; none of the node's variables except PASSED."""
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    python = str(Path(sys.executable).parent)
    return {
        "LANG": "C.UTF-8",
        **passed,
        "PATH": f"{python}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "PWD": str(folder),
        "TMPDIR": str(folder / ".tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def tasks_of_user() -> int:
    """Number of processes and threads of this user on the machine."""
    own, count = os.geteuid(), 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == own:
                count += os.stat(f"/proc/{entry.name}/task").st_nlink - 2  # noqa: PTH116 - called for each process
    return count


def signals_confined() -> bool:
    """Whether this kernel's Landlock restricts signals to a command's own processes; else it can send none."""
    from runners.agent.jail import kernel

    return kernel.landlock_version() >= kernel.LANDLOCK_OF_SIGNALS


@functools.cache
def mode_works(mode: Mode) -> str:
    """Why a jail of this kind cannot be built here; empty if it can."""
    with tempfile.TemporaryDirectory(prefix="jail-probe-") as folder:
        try:
            ended = Sandbox(Path(folder), Bounds(timeout_s=20), mode=mode).run(["true"], lambda: None)
        except NotConfined as error:
            return str(error)
    return "" if ended.code == 0 else ended.stopped or f"the probe ended with {ended.code}: {ended.output.strip()}"


def best_mode() -> Mode:
    """The best kind of jail that works here.

    Raises:
        NotConfined: none works.
    """
    reasons = []
    for mode in MODES:
        if not (reason := mode_works(mode)):
            return mode
        reasons.append(f"{mode}: {reason}")
    raise NotConfined(
        "agents cannot run code on this node: no kind of confinement works here "
        f"({'; '.join(reasons)}); allow user namespaces or Landlock, or turn off the tools python and shell"
    )
