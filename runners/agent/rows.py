"""The rows of an agent task: what determines an item's run, and whether the files that it left still stand."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from flowmesh.files.folder import Folder
from flowmesh.files.removal import empty
from flowmesh.files.walk import Troubles, walk
from runners.agent.config import AgentConfig, McpServer, Model, SandboxBounds
from runners.agent.workspace import remove
from runners.rows.keys import key_of

WORKSPACE = "workspace"
"""In the task's folder; each item of a data source has its own below it."""
MAX_FILES = 100_000
"""A run that left more is done again by a retry."""


def item_folder(out_dir: Path, index: int, *, batch: bool) -> Path:
    return out_dir / WORKSPACE / (f"{index:04d}" if batch else "")


def config_digest(config: AgentConfig, max_turns: int) -> str:
    """Of what a configuration asks for, not of how the model and the servers are reached, for how long, or with what
    bounds."""
    model = config.model
    same = Model()
    config = msgspec.structs.replace(
        config,
        description="",
        max_turns=max_turns,
        timeout_s=None,
        sandbox=SandboxBounds(),
        model=msgspec.structs.replace(
            model,
            base_url=None,
            serve=None,
            api_key_env=None,
            headers={},
            stream=same.stream,
            timeout_s=same.timeout_s,
            retries=same.retries,
            enforce_cpu=False,
        ),
        mcp_servers={name: _asked(server) for name, server in config.mcp_servers.items()},
    )
    return key_of(config)


def _asked(server: McpServer) -> McpServer:
    return msgspec.structs.replace(server, env={}, env_from=(), url=None, headers={}, timeout_s=1.0)


def files_digest(folder: Path) -> str:
    """Of the names and sizes of the files below `folder`; empty where there are none.

    Raises:
        OSError: there are more than MAX_FILES, or a folder cannot be read.
    """
    found, troubles = [], Troubles()
    try:
        with Folder.open(folder.resolve()) as top:
            for entry in walk(top.fd, troubles):
                if not entry.is_folder:
                    found.append(f"{entry.path}\0{entry.status.st_size}\n")
                if len(found) > MAX_FILES:
                    raise OSError(f"{folder} has more than {MAX_FILES} files")
    except FileNotFoundError:
        return ""
    troubles.check()
    if not found:
        return ""
    return hashlib.blake2b("".join(sorted(found)).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def stands(folder: Path, digest: str) -> bool:
    """Whether the files that a finished run left are still in its folder."""
    try:
        return files_digest(folder) == digest
    except OSError:
        return not digest and not folder.exists()


def clear(folder: Path, keep: frozenset[str]) -> None:
    """Remove what runs that did not finish have left in the workspace.

    Args:
        keep: names in it that stay.
    """
    if not folder.is_dir() or folder.is_symlink():
        remove(folder)
        return
    with Folder.open(folder.resolve()) as opened:
        left = empty(opened.fd, keep.__contains__)
    for each in list(left.values())[:1]:
        logging.getLogger(__name__).warning("files of an earlier run are left in %s: %s", folder, each)
