"""One task that has GPUs, seen from outside: its processes on them, what it uses, which faults were its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from flowmesh.execution.gpu.process_usage import TreeUse
from flowmesh.execution.gpu.quarantine import is_below
from flowmesh.execution.run import Run
from flowmesh.node.devices import GpuLost, GpuSample, Look
from flowmesh.node.energy import TaskMeter
from flowmesh.node.gpu import Baseline, ReleaseProof
from flowmesh.node.health import Finding


class Watched:
    """A task that has GPUs."""

    def __init__(self, run: Run, proof: ReleaseProof, meter: TaskMeter, *, whole: bool) -> None:
        self.run = run
        self.proof = proof
        self.meter = meter
        self.whole = whole
        """Whether we have seen it from its start; if not, its joules are not known."""
        self.pids: set[int] = set()
        """Its own processes that were seen on a GPU."""
        self.use = TreeUse()
        self.faults: list[str] = []
        self.lost_looks = 0

    def observe(self, looks: Mapping[str, Look]) -> None:
        """Note one look; one at other GPUs only says nothing."""
        self.proof.observe(looks)
        self.meter.observe(looks)
        mine = [look for uuid in self.run.gpus if (look := looks.get(uuid)) is not None]
        for look in mine:
            if isinstance(look, GpuSample) and self.run.pid is not None:
                there = look.pids | {process.pid for process in look.graphics}
                self.pids.update(pid for pid in there - self.pids if is_below(pid, self.run.pid))
        if not mine:
            return
        self.lost_looks = self.lost_looks + 1 if any(isinstance(look, GpuLost) for look in mine) else 0

    def is_to_blame(self, finding: Finding) -> bool:
        return blames(finding, self.run.gpus, self.pids, self.proof.baselines)


def blames(
    finding: Finding, uuids: Collection[str], own_pids: Collection[int], baselines: Mapping[str, Baseline]
) -> bool:
    """Whether a fault was a task's: by its processes, or, where the driver counts pids in another namespace than we
    do, by there having been somebody on its GPUs who was not there before it.

    Args:
        own_pids: the task's processes that have been seen on its GPUs.
    """
    if not set(finding.uuids) & set(uuids):
        return False
    if not finding.pids or finding.pids & set(own_pids):
        return True
    before = {pid for baseline in baselines.values() for pid in baseline.pids}
    return not own_pids and bool(finding.pids - before)
