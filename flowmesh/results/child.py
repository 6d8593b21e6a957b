"""Entry point of the delivery child: waits for the credentials on the pipe, then delivers its spool folder."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from flowmesh.processes.pipe import Credentials, FrameError, Pipe
from flowmesh.results import delivery

NICE = 5
"""The next task runs beside the delivery, and comes first."""
CREDENTIALS_TIMEOUT_S = 60.0
"""Longer than a restart of the supervisor takes. After it the delivery runs without a token."""


def main(pipe: Pipe, spool: Path) -> int:
    """Deliver; 0 where everything arrived, else 1 with the reason in delivered.json."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    given = credentials_of(pipe)
    return delivery.main(pipe, spool, given.token, keys=given.s3)


def credentials_of(pipe: Pipe) -> Credentials:
    """The node's first frame; without secrets where it does not come."""
    deadline = time.monotonic() + CREDENTIALS_TIMEOUT_S
    while (left_s := deadline - time.monotonic()) > 0:
        pipe.wait(left_s)
        try:
            frame = pipe.poll()
        except EOFError:
            break
        except FrameError:
            continue
        if isinstance(frame, Credentials):
            return frame
    return Credentials()
