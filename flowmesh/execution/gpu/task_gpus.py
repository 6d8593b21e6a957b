"""One running task's GPUs: its processes on them, what it uses, and the faults that it is to blame for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from flowmesh.execution.gpu.process_usage import TreeUse
from flowmesh.execution.run import Run
from flowmesh.node.devices import GpuLost, GpuReading, GpuSample
from flowmesh.node.energy import TaskMeter
from flowmesh.node.health import Finding
from flowmesh.node.release_proof import ReleaseProof
from flowmesh.node.release_state import Baseline
from flowmesh.processes.tree import is_same_or_below


class TaskGpus:
    def __init__(self, run: Run, proof: ReleaseProof, meter: TaskMeter, *, whole: bool) -> None:
        self.run = run
        self.proof = proof
        self.meter = meter
        self.whole = whole
        """Whether this supervisor saw the task start; if not, its energy is not known."""
        self.pids: set[int] = set()
        """Its processes that were seen on a GPU."""
        self.use = TreeUse()
        self.faults: list[str] = []
        self.lost_samples = 0

    def observe(self, readings: Mapping[str, GpuReading]) -> None:
        """Take in a sample; one that has none of its GPUs changes nothing."""
        self.proof.observe(readings)
        self.meter.observe(readings)
        mine = [look for uuid in self.run.gpus if (look := readings.get(uuid)) is not None]
        for look in mine:
            if isinstance(look, GpuSample) and self.run.pid is not None:
                there = look.pids | {process.pid for process in look.graphics}
                self.pids.update(pid for pid in there - self.pids if is_same_or_below(pid, self.run.pid))
        if not mine:
            return
        self.lost_samples = self.lost_samples + 1 if any(isinstance(look, GpuLost) for look in mine) else 0

    def is_to_blame(self, finding: Finding) -> bool:
        return blames(finding, self.run.gpus, self.pids, self.proof.baselines)


def blames(
    finding: Finding, uuids: Collection[str], own_pids: Collection[int], baselines: Mapping[str, Baseline]
) -> bool:
    """Whether a task caused a fault: one of its processes did, or, if the driver's pids are those of another namespace,
    a process that was not on its GPUs before it started.

    Args:
        own_pids: the task's processes that were seen on its GPUs.
    """
    if not set(finding.uuids) & set(uuids):
        return False
    if not finding.pids or finding.pids & set(own_pids):
        return True
    before = {pid for baseline in baselines.values() for pid in baseline.pids}
    return not own_pids and bool(finding.pids - before)
