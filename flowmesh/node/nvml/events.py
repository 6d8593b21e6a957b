"""The driver's critical events: Xid, uncorrectable memory errors, GPUs that became unavailable."""

from __future__ import annotations

from typing import Any

from flowmesh.node.devices import EventKind, GpuEvent
from flowmesh.node.nvml.binding import Binding
from flowmesh.node.nvml.handles import Handles

_WAIT_MS = 1
_NO_INSTANCE = 0xFFFFFFFF


class EventSet:
    """Subscribes to the critical events of all boards, as far as each supports them. Lives from init to shutdown."""

    def __init__(self, binding: Binding, handles: Handles) -> None:
        self._binding = binding
        self._handles = handles
        self.broken = False
        """Whether events may be missing: a GPU was lost or the driver reloaded. `Session.sample` finds out which."""
        nvml, optional = binding.nvml, binding.optional
        self._set: Any = optional("", "events", nvml.nvmlEventSetCreate)
        if self._set is None:
            return
        critical = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
        critical |= binding.unavailable_event
        for board, handle in handles.boards().items():
            kinds = critical & (optional(board, "event types", nvml.nvmlDeviceGetSupportedEventTypes, handle) or 0)
            if kinds:
                optional(board, "events", nvml.nvmlDeviceRegisterEvents, handle, kinds, self._set)

    def take(self, at_most: int) -> list[GpuEvent]:
        """The events that wait, oldest first; returns within milliseconds."""
        nvml = self._binding.nvml
        events: list[GpuEvent] = []
        while self._set is not None and len(events) < at_most:
            try:
                data = nvml.nvmlEventSetWait_v2(self._set, _WAIT_MS)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:
                    self.broken = True
                break
            if (event := self._decode(data)) is not None:
                events.append(event)
        return events

    def _decode(self, data: Any) -> GpuEvent | None:
        nvml = self._binding.nvml
        kind = {
            nvml.nvmlEventTypeXidCriticalError: EventKind.XID,
            nvml.nvmlEventTypeDoubleBitEccError: EventKind.ECC_DOUBLE_BIT,
            self._binding.unavailable_event: EventKind.UNAVAILABLE,
        }.get(data.eventType)
        if kind is None:
            return None
        instance = int(data.gpuInstanceId)
        board = self._handles.board_at(data.device)
        if board is None:
            board = self._binding.optional("", "uuid of an event's device", nvml.nvmlDeviceGetUUID, data.device)
        return GpuEvent(
            kind=kind,
            board=board,
            xid=int(data.eventData) if kind is EventKind.XID else None,
            gpu_instance=None if instance == _NO_INSTANCE else instance,
        )
