"""Which GPUs may be worked on, and whose task a fault was: from the driver's events and from who was on the card.

Pure bookkeeping over what `nvml` delivered; a card that is condemned comes back by `readmit`, after a canary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from flowmesh.node.devices import EventKind, GpuEvent, GpuInfo, GpuLost, GpuSample, Look
from flowmesh.node.xid import XidVerdict, describe_xid, xid_verdict


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One event, judged."""

    verdict: XidVerdict
    message: str
    """One line for the log and for the task's verdict."""
    uuids: tuple[str, ...]
    """The GPUs (or slices) that it concerns."""
    pids: frozenset[int]
    """Processes on them when it was found: whose task this was."""
    xid: int | None = None


class GpuHealth:
    """The health of a node's GPUs. Owned by one loop."""

    def __init__(self, gpus: Sequence[GpuInfo]) -> None:
        self._gpus = tuple(gpus)
        self._condemned: dict[str, str] = {}
        self._pids: dict[str, frozenset[int]] = {gpu.uuid: frozenset() for gpu in gpus}
        self._throttled: dict[str, tuple[str, ...]] = {}

    def observe(self, looks: Mapping[str, Look]) -> tuple[Finding, ...]:
        """Note who is on the cards. A card that does not answer is condemned; findings are the newly condemned ones.

        A card keeps the processes of its last look with any, so that an event can be blamed on one that has just died.
        """
        findings = []
        for uuid, look in looks.items():
            match look:
                case GpuSample():
                    if look.pids:
                        self._pids[uuid] = look.pids
                    self._throttled[uuid] = look.throttled
                case GpuLost() if uuid not in self._condemned:
                    message = f"{uuid} does not answer: {look.why}"
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
        """These GPUs are proven empty: what happens from now on is not the last task's doing."""
        for uuid in uuids:
            self._pids[uuid] = frozenset()

    def judge(self, events: Sequence[GpuEvent]) -> tuple[Finding, ...]:
        """What these events mean; cards with a device fault are condemned."""
        findings = tuple(self._judge(event) for event in events)
        for finding in findings:
            if finding.verdict is XidVerdict.DEVICE:
                for uuid in finding.uuids:
                    self._condemned.setdefault(uuid, finding.message)
        return findings

    def condemned(self, uuids: Sequence[str]) -> dict[str, str]:
        """Of these GPUs, those that must not be worked on, and why."""
        return {uuid: self._condemned[uuid] for uuid in uuids if uuid in self._condemned}

    def readmit(self, uuids: Sequence[str]) -> None:
        """A canary has run on these: they are good again."""
        for uuid in uuids:
            self._condemned.pop(uuid, None)

    def throttled(self, uuids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Of these GPUs, those whose clocks are held down at the last look, and why; for the heartbeat."""
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
    """A fault of a board is a fault of all its slices, unless the driver names the slice, or the board is unknown."""
    if event.board is not None and event.board != gpu.board:
        return False
    return gpu.mig is None or event.gpu_instance is None or gpu.mig.gpu_instance == event.gpu_instance
