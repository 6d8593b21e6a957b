"""Which GPUs may be used, and which processes a fault concerns, from the driver's events and its process lists.

Pure bookkeeping over what `nvml` returned. A condemned GPU is readmitted after a canary has run on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from flowmesh.node.devices import EventKind, GpuEvent, GpuInfo, GpuLost, GpuReading, GpuSample
from flowmesh.node.xid import XidVerdict, describe_xid, xid_verdict


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One event and what it means."""

    verdict: XidVerdict
    message: str
    """One line for the log and for the task's verdict."""
    uuids: tuple[str, ...]
    """The GPUs or MIG slices that it concerns."""
    pids: frozenset[int]
    """Processes on them at that time, which identify the task."""
    xid: int | None = None


class GpuHealth:
    """The health of a node's GPUs. Used from one event loop."""

    def __init__(self, gpus: Sequence[GpuInfo]) -> None:
        self._gpus = tuple(gpus)
        self._condemned: dict[str, str] = {}
        self._pids: dict[str, frozenset[int]] = {gpu.uuid: frozenset() for gpu in gpus}
        self._throttled: dict[str, tuple[str, ...]] = {}

    def observe(self, readings: Mapping[str, GpuReading]) -> tuple[Finding, ...]:
        """Record which processes use which GPU, and condemn a GPU that does not answer.

        The processes of the last sample that had any are kept, so that an event can be attributed to one that has
        just died.

        Returns:
            A finding for each GPU that is condemned now and was not before.
        """
        findings = []
        for uuid, reading in readings.items():
            match reading:
                case GpuSample():
                    if reading.pids:
                        self._pids[uuid] = reading.pids
                    self._throttled[uuid] = reading.throttled
                case GpuLost() if uuid not in self._condemned:
                    message = f"{uuid} does not answer: {reading.why}"
                    self._condemned[uuid] = message
                    findings.append(
                        Finding(
                            verdict=XidVerdict.DEVICE,
                            message=message,
                            uuids=(uuid,),
                            pids=self._pids.get(uuid, frozenset()),
                        )
                    )
                case GpuLost():
                    pass
        return tuple(findings)

    def cleared(self, uuids: Sequence[str]) -> None:
        """These GPUs are proven free: events from now on do not concern the last task."""
        for uuid in uuids:
            self._pids[uuid] = frozenset()

    def judge(self, events: Sequence[GpuEvent]) -> tuple[Finding, ...]:
        """What these events mean. GPUs with a device fault are condemned."""
        findings = tuple(self._judge(event) for event in events)
        for finding in findings:
            if finding.verdict is XidVerdict.DEVICE:
                for uuid in finding.uuids:
                    self._condemned.setdefault(uuid, finding.message)
        return findings

    def condemned(self, uuids: Sequence[str]) -> dict[str, str]:
        """Those of these GPUs that must not be used, each with the reason."""
        return {uuid: self._condemned[uuid] for uuid in uuids if uuid in self._condemned}

    def readmit(self, uuids: Sequence[str]) -> None:
        """A canary has run on these GPUs: they may be used again."""
        for uuid in uuids:
            self._condemned.pop(uuid, None)

    def throttled(self, uuids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Those of these GPUs whose clocks were reduced at the last sample, each with the reasons (for heartbeats)."""
        return {uuid: reasons for uuid in uuids if (reasons := self._throttled.get(uuid))}

    def _judge(self, event: GpuEvent) -> Finding:
        gpus = [gpu for gpu in self._gpus if _concerns(event, gpu)]
        where = event.board or "an unnamed GPU"
        match event.kind:
            case EventKind.XID:
                xid = event.xid or 0
                verdict, what = xid_verdict(xid), describe_xid(xid)
            case EventKind.ECC_DOUBLE_BIT:
                verdict, what = XidVerdict.DEVICE, "uncorrectable double-bit memory error"
            case EventKind.UNAVAILABLE:
                verdict, what = XidVerdict.DEVICE, "the driver reports the GPU as unavailable"
        return Finding(
            verdict=verdict,
            message=f"{what} on {where}",
            uuids=tuple(gpu.uuid for gpu in gpus),
            pids=frozenset[int]().union(*(self._pids.get(gpu.uuid, frozenset()) for gpu in gpus)),
            xid=event.xid,
        )


def _concerns(event: GpuEvent, gpu: GpuInfo) -> bool:
    """Whether an event concerns a GPU. Without a board it may be any GPU; without a slice, every slice of the board."""
    if event.board is not None and event.board != gpu.board:
        return False
    return gpu.mig is None or event.gpu_instance is None or gpu.mig.gpu_instance == event.gpu_instance
