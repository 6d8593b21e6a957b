"""Failures of a served model, whichever library serves it."""

from __future__ import annotations

from flowmesh.messages.job import Fault
from runners.api import RunnerError


class ServerLost(RunnerError):
    """The server does not answer any more. Another process may."""

    fault = Fault.CRASH
