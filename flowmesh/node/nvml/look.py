"""The machine's GPUs as a new process sees them: one that runs may not see a GPU that came back.

`python -m flowmesh.node.nvml.look` prints the inventory as JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from flowmesh.errors import DeviceError
from flowmesh.node.devices import Inventory
from flowmesh.node.nvml.binding import NoDriverError
from flowmesh.node.nvml.client import INIT_DEADLINE_S
from flowmesh.node.nvml.session import Session
from flowmesh.processes import environ


def look_again() -> Inventory:
    """The inventory that a new process takes. Blocks; a process that hangs in the driver is killed."""
    command = [sys.executable, "-P", "-m", "flowmesh.node.nvml.look"]
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=environ.with_package(os.environ),
            capture_output=True,
            timeout=INIT_DEADLINE_S,
            check=False,
        )
        # Its report and not its exit status, which the supervisor's SIGCHLD handler may have collected.
        return msgspec.json.decode(done.stdout, type=Inventory)
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        return Inventory(unusable=(f"the GPUs could not be listed: {error}",))


def main() -> None:
    try:
        inventory = Session().inventory()
    except NoDriverError as error:
        inventory = Inventory(unusable=error.unusable)
    except DeviceError as error:
        inventory = Inventory(unusable=(str(error),))
    sys.stdout.buffer.write(msgspec.json.encode(inventory))


if __name__ == "__main__":
    main()
