"""A rank's process under torchrun: `python -m` this module, with the group's folder as its argument."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from flowmesh.processes.pipe import Pipe
from runners.api import Context
from runners.run_warnings import collected
from runners.training import core, ranks
from runners.training.plan import read
from runners.training.rank_order import ORDER_FILE, SOCKET, Order
from runners.training.ranks import Place


def main(folder: Path) -> NoReturn:
    """Run the rank given by torchrun's environment variables."""
    ranks.die_with_parent(os.getppid())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    order = msgspec.json.decode((folder / ORDER_FILE).read_bytes(), type=Order)
    place = Place(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_world=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    ranks.redirect(Path(order.job.out_dir) / "logs" / str(place.local_rank))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    ctx = Context(order.job, _pipe(folder) if place.leads_node else None)
    os.environ["OMP_NUM_THREADS"] = str(ranks.threads(ctx, place))

    def work(place: Place, ctx: Context) -> dict[str, object]:
        core.quiet()
        return core.train(read(order.task_type, ctx), ctx, order.fetched, order.layout, place)

    with collected(ctx):
        ranks.serve(place, ctx, folder, work)


def _pipe(folder: Path) -> Pipe | None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(f"/proc/self/fd/{handle}/{SOCKET}")
            _, fds, _, _ = socket.recv_fds(peer, 1, 1)
    finally:
        os.close(handle)
    return Pipe(socket.socket(fileno=fds[0])) if fds else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
