"""Starts a task's program: as a new process, or as a fork of this one that becomes a Python script."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.processes import linux
from flowmesh.progress import DESCRIPTOR
from runners.api import BadRequest, Context, MissingDependency
from runners.command.lines import Lines
from runners.gang import endpoint, environment, gang_of

LAUNCHER = "runners.training.rendezvous"
"""torchrun that listens on its endpoint's address only."""
NO_PROGRAM, NOT_EXECUTABLE = 127, 126
"""Exit statuses of a shell that finds no such program, or may not run it."""


class NoProgram(BadRequest):
    """A program cannot be started. `status` is what a shell's exit status would be."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Place(msgspec.Struct, frozen=True):
    """Where and how a program starts."""

    folder: Path
    env: dict[str, str]
    lines: Lines
    stdio: tuple[int, int, int] | None = None
    """Descriptors of its standard input, output and error. None: no input, and the task's logs."""
    umask: int | None = None
    """None: this process's."""

    def whole_env(self) -> dict[str, str]:
        return {**self.env, DESCRIPTOR: str(self.lines.writer)}


def spawn(argv: Sequence[str], place: Place) -> int:
    """Start a program in a session of its own; returns its pid.

    Raises:
        NoProgram: there is none of that name, or it cannot be run.
    """
    env = place.whole_env()
    program = _found(argv[0], place.folder, env.get("PATH", os.defpath))

    def become() -> NoReturn:
        os.chdir(place.folder)
        if place.umask is not None:
            os.umask(place.umask)
        if place.stdio is None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execve(program, list(argv), env)
        except OSError as error:
            os.write(2, f"{program}: cannot be run: {error.strerror}\n".encode(errors="replace"))
            os._exit(NOT_EXECUTABLE)

    return fork(become, place)


def _found(name: str, folder: Path, path: str) -> str:
    if "/" not in name:
        if (program := shutil.which(name, path=path)) is None:
            message = f"spec.command: there is no program {name!r} in PATH; give its path, or install it"
            raise NoProgram(message, NO_PROGRAM)
        return program
    file = folder / name
    if not file.is_file():
        raise NoProgram(f"spec.command: there is no file {name!r} to run", NO_PROGRAM)
    if not os.access(file, os.X_OK):
        raise NoProgram(
            f"spec.command: {name!r} may not be executed: chmod +x, or name its interpreter", NOT_EXECUTABLE
        )
    return str(file)


def fork(become: Callable[[], NoReturn], place: Place) -> int:
    """Fork this process, with its libraries, in a session of its own; returns the pid.

    Args:
        become: what the fork does.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            os.set_inheritable(place.lines.writer, True)
            for target, source in enumerate(place.stdio or ()):
                os.dup2(source, target, inheritable=True)
            become()
    except BaseException:  # noqa: BLE001 - nothing may return into the task's process
        traceback.print_exc()
    finally:
        os._exit(NO_PROGRAM)


def torchrun(ctx: Context, ranks: int, argv: Sequence[str], *, python: bool) -> list[str]:
    """The command line that runs `argv` as each rank of a group: on this machine, or with the task's other members.

    Args:
        ranks: on this machine.
        python: whether argv is a Python file or `-m` and a module, with its arguments.

    Raises:
        MissingDependency: torch is not installed here.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("torch", "spec.nproc_per_node")
    return [
        *(sys.executable, "-m", LAUNCHER, "--nproc-per-node", str(ranks), *_meeting(ctx)),
        *("--max-restarts", "0", "--monitor-interval", "0.2"),
        *([] if python else ["--no-python"]),
        argv[0],
        *(each.replace("$", "$$") for each in argv[1:]),  # torchrun replaces names after a $
    ]


def _meeting(ctx: Context) -> list[str]:
    gang = gang_of(ctx)
    if gang is None:
        own = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", ctx.task_id]
        return [*own, "--local-addr", "127.0.0.1"]
    place = ["--nnodes", str(gang.size), "--node-rank", str(gang.rank), "--rdzv-backend", "static"]
    return [*place, "--rdzv-endpoint", endpoint(gang), "--rdzv-id", gang.rdzv_id]


def of_group(ctx: Context, ranks: int) -> dict[str, str]:
    """What ranks need in their environment: their share of threads, and the interface on which they meet."""
    return {
        "OMP_NUM_THREADS": str(max(1, ctx.threads // ranks)),
        **({"GLOO_SOCKET_IFNAME": "lo"} if gang_of(ctx) is None else {}),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)),
    }


def of_gang(ctx: Context) -> dict[str, str]:
    """The variables by which a program finds the other members of its task; none where there are none."""
    gang = gang_of(ctx)
    return {} if gang is None else environment(gang)
