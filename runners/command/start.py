"""Starts a task's program: as a new process, or as a fork of this one that becomes a Python script."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from flowmesh.processes import linux
from flowmesh.progress import DESCRIPTOR
from runners.api import BadRequest, Context, MissingDependency
from runners.command.lines import Lines

LAUNCHER = "runners.training.rendezvous"
"""torchrun that listens on its endpoint's address only."""
NO_PROGRAM = 127
"""Exit status of a shell that finds no such program."""


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
        return {**self.env, DESCRIPTOR: str(self.lines.fd)}


def spawn(argv: Sequence[str], place: Place) -> int:
    """Start a program in a session of its own; returns its pid.

    Raises:
        BadRequest: there is no such program, or it cannot be run.
    """
    parent, env = os.getpid(), place.whole_env()
    stdin, stdout, stderr = place.stdio or (subprocess.DEVNULL, None, None)
    program = shutil.which(argv[0], path=env.get("PATH")) if "/" not in argv[0] else argv[0]
    if program is None:
        raise BadRequest(f"spec.command: there is no program {argv[0]!r} in PATH; give its path, or install it")

    def enter() -> None:
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(NO_PROGRAM)

    try:
        return subprocess.Popen(
            list(argv),
            executable=program,
            cwd=place.folder,
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(place.lines.fd,),
            start_new_session=True,
            umask=-1 if place.umask is None else place.umask,
            preexec_fn=enter,  # noqa: PLW1509 - this process has one thread
        ).pid
    except OSError as error:
        raise BadRequest(f"spec.command: {argv[0]!r} cannot be run: {error.strerror}") from None


def fork(become: Callable[[], None], place: Place) -> int:
    """Fork this process, with its libraries, in a session of its own; returns the pid.

    Args:
        become: what the fork does; it does not return.
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
            os.set_inheritable(place.lines.fd, True)
            for target, source in enumerate(place.stdio or ()):
                os.dup2(source, target, inheritable=True)
            become()
    finally:
        os._exit(NO_PROGRAM)


def torchrun(ctx: Context, ranks: int, argv: Sequence[str], *, python: bool) -> list[str]:
    """The command line that runs `argv` as each rank of a group on this machine.

    Args:
        python: whether argv is a Python file or `-m` and a module, with its arguments.

    Raises:
        MissingDependency: torch is not installed here.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("torch", "spec.nproc_per_node")
    return [
        *(sys.executable, "-m", LAUNCHER, "--nnodes", "1", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", ctx.task_id),
        *("--local-addr", "127.0.0.1", "--max-restarts", "0", "--monitor-interval", "0.2"),
        *([] if python else ["--no-python"]),
        *argv,
    ]


def of_group(ctx: Context, ranks: int) -> dict[str, str]:
    """What ranks need in their environment: their share of threads, and the loopback interface."""
    return {
        "OMP_NUM_THREADS": str(max(1, ctx.threads // ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)),
    }
