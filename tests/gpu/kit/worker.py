"""Runs the steps that the session names, and sends it their rows. Killed by the session where a step hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowmesh.processes.preload import named
from tests.gpu.kit import steps
from tests.gpu.kit.scene import Scene, software


def main() -> None:
    to_read, from_write, stacks, out, scratch, dry, xid = sys.argv[1:]
    pipe = int(from_write)
    os.set_inheritable(pipe, False)
    os.set_inheritable(int(to_read), False)
    dump = open(stacks, "a")  # noqa: SIM115 - the handler writes to it at any time
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)

    def send(frame: dict[str, Any]) -> None:
        data = json.dumps(frame).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    table = steps.table()
    send({"shares": [asdict(each.share) for each in table.values()], "machine": software()})
    scene = Scene(send, out=Path(out), scratch=Path(scratch), dry=bool(int(dry)), xid=bool(int(xid)))
    with os.fdopen(int(to_read)) as orders:
        for line in orders:
            order = json.loads(line)
            step = table[order["step"]]
            with scene.step(step.share.name, order["seconds"]):
                named(step.target)(scene)
            send({"end": order["step"]})
    scene.close()


if __name__ == "__main__":
    main()
