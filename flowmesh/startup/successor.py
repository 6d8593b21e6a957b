"""The program that takes this one's place (reload, upgrade): tried in a child first, then started by exec."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from flowmesh.errors import LaunchError
from flowmesh.startup import secret_environ
from flowmesh.startup.log_writer import LogWriter

LAST_LINES_S = 1.0
"""How long an exec waits for whoever reads the log."""
CHECK_TIMEOUT_S = 90.0
"""Longer than the question to each environment's interpreter may take."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those that the supervisor handles. Between an exec and the successor's handlers they would end the process."""


def check(environ: Mapping[str, str]) -> None:
    """Have the program that is on disk check itself and the settings, as it would be started. Blocks.

    Args:
        environ: the node's environment, with its secrets.

    Raises:
        LaunchError: it would not start, and why.
    """
    try:
        Path.cwd()
    except OSError:
        raise LaunchError(
            "the folder that the node was started in is gone; make it again, or restart the node"
        ) from None
    command = [sys.executable, *sys.orig_argv[1:], "--check", "--json"]
    with (
        secret_environ.handed_over(environ) as (env, secrets),
        subprocess.Popen(
            command,
            env=env,
            pass_fds=(secrets,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child,
    ):
        try:
            report, errors = child.communicate(timeout=CHECK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise LaunchError(f"the program on disk did not check itself within {CHECK_TIMEOUT_S:.0f} s") from None
    try:
        # Its report and not its exit status, which the supervisor's SIGCHLD handler may have collected.
        msgspec.json.decode(report, type=dict[str, Any])
    except msgspec.DecodeError:
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it printed no reason"
        raise LaunchError(f"the program on disk does not start: {reason}") from None


def hold_signals() -> None:
    """Let signals wait, in this thread and those that it starts, until `take_signals`, also over an exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def take_signals() -> None:
    """Take those that have waited, and all that come from now on. Their handlers are installed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def replace(environ: Mapping[str, str]) -> NoReturn:
    """exec the program that is on disk; signals must be held.

    Args:
        environ: the node's environment, with its secrets.
    """
    sys.stdout.flush()
    if isinstance(sys.stderr, LogWriter):
        sys.stderr.drain(LAST_LINES_S)
    with secret_environ.handed_over(environ) as (env, _secrets):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
