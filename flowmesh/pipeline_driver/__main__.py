"""`python -m flowmesh.pipeline_driver`: started by a supervisor, which writes the job to its standard input."""

from __future__ import annotations

import os
import sys

import msgspec

from flowmesh.client import Client
from flowmesh.pipeline_driver.drive import drive
from flowmesh.pipeline_driver.job import Job
from flowmesh.pipeline_driver.lease import HandedOver, Lease, Lost
from flowmesh.redaction import Redactor

_MOST = 1 << 20
"""Of the job's line."""


def main() -> int:
    """Drive the pipeline of one job; returns the exit code: 0 where nothing is left to do for it here."""
    job = msgspec.json.decode(_line(), type=Job)
    with Client(job.url, topic=job.topic) as client:
        lease = Lease(client, job)
        try:
            drive(job, lease)
        except HandedOver:
            lease.let_go()
        except Lost as error:
            lease.say(f"left it: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor's log should have it
            lease.say(Redactor([job.url])(f"failed: {type(error).__name__}: {error}"))
            return 1
    return 0


def _line() -> bytes:
    """The first line of standard input, and not a byte more: that it ends later is a sign of its own."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _MOST:
        more = os.read(0, 65536)
        if not more:
            break
        data += more
    return data


if __name__ == "__main__":
    sys.exit(main())
