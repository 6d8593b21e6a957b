"""The folders and files that settings name, as absolute paths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flowmesh.errors import ConfigError
from flowmesh.settings.schema import Settings
from flowmesh.validation.describe import quoted


def results_dir(settings: Settings) -> Path:
    """The root folder of all outputs, absolute."""
    return _absolute(settings.results.dir, "results.dir")


def log_file(settings: Settings) -> Path | None:
    """The node's log file, absolute; None: no file."""
    return None if settings.node.log_file is None else _absolute(settings.node.log_file, "node.log_file")


def state_dir(settings: Settings, environ: Mapping[str, str], *, euid: int | None = None) -> Path:
    """The node's folder for journal, sockets and spool, absolute.

    Args:
        environ: may hold STATE_DIRECTORY, XDG_STATE_HOME and HOME.
        euid: user id to decide for; None: the process's effective user.

    Raises:
        ConfigError: the path depends on a home directory, and there is none.
    """
    if settings.node.state_dir is not None:
        return _absolute(settings.node.state_dir, "node.state_dir")
    # systemd sets this for StateDirectory=, with a colon between several folders.
    if first := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(first).absolute()
    if (os.geteuid() if euid is None else euid) == 0:
        return Path("/var/lib/flowmesh")
    state_home = Path(environ.get("XDG_STATE_HOME", ""))
    if state_home.is_absolute():  # the XDG specification ignores relative ones
        return state_home / "flowmesh"
    home = environ.get("HOME") or "~"
    return _absolute(home, "node.state_dir") / ".local" / "state" / "flowmesh"


def _absolute(text: str, key: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(
            f"{key}: {quoted(text)} needs a home directory, and there is none; give a full path"
        ) from None
