"""`checkpoints/steps.json`: how far a training run is, and what of it a checkpoint holds. Rewritten at each step."""

from __future__ import annotations

import os
from typing import IO

import msgspec

STEPS_FILE = "steps.json"
FOLDER = "checkpoints"
_BYTES = 256


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of a training run."""

    done: int
    total: int
    checkpointed: int = 0
    """The step of the last whole checkpoint; 0: there is none."""
    lost: int = 0
    """Steps that all attempts together did beyond the checkpoint from which the next attempt went on."""


_decoder = msgspec.json.Decoder(Steps)


def write(fd: int, steps: Steps) -> None:
    """Write the file's whole content with one system call, so that a killed process leaves it whole.

    Raises:
        OSError: it cannot be written.
    """
    os.pwrite(fd, msgspec.json.encode(steps).ljust(_BYTES - 1) + b"\n", 0)


def read(file: IO[bytes]) -> Steps | None:
    """None where the file holds none."""
    try:
        return _decoder.decode(file.read(_BYTES))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
