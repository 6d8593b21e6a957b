"""An attempt's spool folder: its job, the outcome that its child leaves, and the node's own notes on it.

The folder is the task's while the child lives. Afterwards the node takes it back, before anything in it is believed.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import ProtocolError
from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.layout import BASELINE_FILE, Layout
from flowmesh.files.folder import Folder
from flowmesh.files.removal import empty
from flowmesh.messages.job import (
    JOB_FILE,
    MAX_OUTCOME_BYTES,
    OUTCOME_FILE,
    Outcome,
)
from flowmesh.results.safe_files import read_regular

SMALL_BYTES = 64 * 1024
"""An outcome up to this size is read on the loop; a larger one in a thread, and without its result."""
PRIVATE = 0o700
_OF_A_RUN = frozenset({JOB_FILE, OUTCOME_FILE, BASELINE_FILE})
"""What may be there before the results are delivered."""


def _without_result() -> list[Any]:
    default: Any = msgspec.field  # its overloads do not know that one of the two is NODEFAULT
    return [
        (each.name, each.type, default(default=each.default, default_factory=each.default_factory))
        for each in msgspec.structs.fields(Outcome)
        if each.name != "result"
    ]


_Head = msgspec.defstruct("_Head", _without_result(), frozen=True, kw_only=True)
"""An Outcome without its result, which may be large and which the supervisor does not need."""
_head_decoder = msgspec.json.Decoder(_Head)
_outcome_decoder = msgspec.json.Decoder(Outcome)


async def read_outcome(layout: Layout, attempt: int) -> Outcome | None:
    """The outcome that the attempt's child left (a large one without its result); None if there is no valid one."""
    path = layout.spool(attempt) / OUTCOME_FILE
    try:
        if _is_small(path):
            outcome = decode_outcome(path, SMALL_BYTES)
        else:
            outcome = await asyncio.to_thread(decode_outcome, path)
    except ProtocolError as error:
        logger.bind(node_run=attempt).warning("{}", error)
        return None
    return outcome if outcome is not None and outcome.attempt == attempt else None


def _is_small(path: Path) -> bool:
    try:
        return path.lstat().st_size <= SMALL_BYTES
    except OSError:
        return True


def decode_outcome(path: Path, limit_bytes: int = MAX_OUTCOME_BYTES) -> Outcome | None:
    """Read an outcome file; None if there is none.

    Raises:
        ProtocolError: the file is no outcome, or larger than `limit_bytes`.
    """
    try:
        data = read_regular(path, limit_bytes)
        if len(data) <= SMALL_BYTES:
            return _outcome_decoder.decode(data)
        head = _head_decoder.decode(data)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the child's {OUTCOME_FILE} cannot be read: {error}") from error
    return Outcome(**msgspec.structs.asdict(head))


async def take_back(layout: Layout, attempt: int) -> None:
    """Make the spool folder the node's alone again, and remove what the task may have forged in it.

    To be done before the journal says that the attempt is being delivered: from then on a restarted supervisor trusts
    what lies there. What cannot be removed is logged; the task ends all the same.
    """
    if not _taken_back(layout.spool(attempt)):
        await asyncio.to_thread(_remove_strays, layout.spool(attempt))


def _taken_back(spool: Path) -> bool:
    """False if something is left to remove. Quick enough for the loop."""
    try:
        status = spool.lstat()
        if not stat.S_ISDIR(status.st_mode):
            remove_tree(spool)
            return True
        if status.st_uid != os.geteuid():
            os.chown(spool, os.geteuid(), os.getegid(), follow_symlinks=False)
        if stat.S_IMODE(status.st_mode) != PRIVATE:
            spool.chmod(PRIVATE)
        with os.scandir(spool) as entries:
            return all(entry.name in _OF_A_RUN for entry in entries)
    except FileNotFoundError:  # it was never launched
        return True
    except OSError as error:
        logger.bind(path=str(spool)).warning("a task's spool folder could not be taken back: {}", error)
        return False


def _remove_strays(spool: Path) -> None:
    try:
        with Folder.open(spool.resolve()) as folder:
            left = empty(folder.fd, _OF_A_RUN.__contains__)
    except OSError as error:
        logger.bind(path=str(spool)).warning("files that a task left in its spool folder stay there: {}", error)
        return
    if left:
        bound = logger.bind(path=str(spool), count=len(left))
        bound.warning("files that a task left in its spool folder stay there: {}", next(iter(left.values())))
