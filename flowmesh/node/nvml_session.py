"""The blocking half of NVML: one session from init to shutdown, called by one thread only (see `nvml`).

A call that a device or driver does not support is asked once and is None from then on; a device that
does not answer becomes a GpuLost and leaves the others alone.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from flowmesh.errors import DeviceError
from flowmesh.node.devices import (
    EventKind,
    GpuEvent,
    GpuInfo,
    GpuLost,
    GpuProcess,
    GpuSample,
    Inventory,
    Look,
    MigSlice,
)
from flowmesh.node.nvml_binding import Binding, NoDriverError

_EVENT_WAIT_MS = 1
_EVENTS_AT_ONCE = 256
_NO_INSTANCE = 0xFFFFFFFF
_REOPEN_INTERVAL_S = 30.0
"""A lost GPU comes back with a new init only; trying that at every look would cost more than the GPU."""

# nvmlClocksEventReasons that mean a card is slower than it could be; idling and chosen clocks are not among them.
_THROTTLING = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}

T = TypeVar("T")
Handle = Any


class Session:
    """NVML, initialised as late as possible and again whenever the driver forgot us."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._binding: Binding | None = None
        self._open = False
        self._opened_at = 0.0
        self._handles: dict[str, Handle] = {}
        self._boards: dict[str, str] = {}
        self._by_address: dict[int, str] = {}
        self._events: Any = None
        self._reopen = False

    @property
    def _bound(self) -> Binding:
        assert self._binding is not None, "_ensure_open comes first"
        return self._binding

    @property
    def _nvml(self) -> Any:
        return self._bound.nvml

    # ---- what the node asks --------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """All GPUs of the machine.

        Raises:
            NoDriverError: there is no driver.
            DeviceError: there is one, and it does not work.
        """
        self._ensure_open()
        nvml = self._nvml
        gpus: list[GpuInfo] = []
        unusable: list[str] = []
        for index in range(self._must("number of GPUs", nvml.nvmlDeviceGetCount)):
            try:
                gpus.extend(self._describe(index))
            except nvml.NVMLError as error:
                unusable.append(f"GPU {index}: {error}")
        cuda = self._bound.optional("", "cuda version", nvml.nvmlSystemGetCudaDriverVersion_v2)
        return Inventory(
            gpus=tuple(gpus),
            unusable=tuple(unusable),
            driver_version=self._bound.optional("", "driver version", nvml.nvmlSystemGetDriverVersion),
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def sample(self, uuids: Sequence[str], *, memory_only: bool = False) -> dict[str, Look]:
        """One look at each GPU; `memory_only` asks for bytes and processes and nothing else.

        Raises:
            DeviceError: the driver itself does not answer as it should.
        """
        if self._reopen and self._clock() - self._opened_at >= _REOPEN_INTERVAL_S:
            self._close()
        self._ensure_open()
        try:
            return {uuid: self._look(uuid, memory_only) for uuid in uuids}
        except self._nvml.NVMLError:
            self._close()  # the driver forgot us, as after a reload: greet it again, once
        self._ensure_open()
        try:
            return {uuid: self._look(uuid, memory_only) for uuid in uuids}
        except self._nvml.NVMLError as error:
            self._close()
            raise DeviceError(f"NVML: {error}, also after it was initialised again") from error

    def events(self) -> tuple[GpuEvent, ...]:
        """The critical events since the last call.

        Raises:
            DeviceError: as for `sample`.
        """
        self._ensure_open()
        nvml = self._nvml
        found: list[GpuEvent] = []
        while self._events is not None and len(found) < _EVENTS_AT_ONCE:
            try:
                data = nvml.nvmlEventSetWait_v2(self._events, _EVENT_WAIT_MS)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:
                    self._reopen = True  # a lost GPU or a reloaded driver: `sample` tells which
                break
            if (event := self._event(data)) is not None:
                found.append(event)
        return tuple(found)

    def close(self) -> None:
        self._close()

    # ---- one device ----------------------------------------------------------------------------------------------

    def _look(self, uuid: str, memory_only: bool) -> Look:
        nvml = self._nvml
        handle = self._handles.get(uuid)
        if handle is None:
            self._reopen = True  # it may be back after the next init
            return GpuLost(uuid, "the driver no longer lists it")
        try:
            memory = self._memory(uuid, handle)
            processes = self._processes(uuid, handle)
        except nvml.NVMLError as error:
            if error.value in self._bound.session_over:
                raise
            self._reopen = True
            return GpuLost(uuid, str(error))
        board = self._boards[uuid]
        brief = GpuSample(uuid=uuid, board=board, used_bytes=int(memory.used), processes=processes)
        if memory_only:
            return brief
        whole = self._handles.get(board, handle)
        utilization = self._bound.optional(uuid, "utilization", nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._bound.optional(board, "power", nvml.nvmlDeviceGetPowerUsage, whole)
        reasons = self._bound.optional(board, "clock reasons", self._clock_reasons, whole) or 0
        return msgspec.structs.replace(
            brief,
            utilization_percent=None if utilization is None else int(utilization.gpu),
            power_w=None if power_mw is None else power_mw / 1000,
            energy_mj=self._bound.optional(board, "energy", nvml.nvmlDeviceGetTotalEnergyConsumption, whole),
            temperature_c=self._bound.optional(
                board, "temperature", nvml.nvmlDeviceGetTemperature, whole, nvml.NVML_TEMPERATURE_GPU
            ),
            throttled=tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        )

    def _describe(self, index: int) -> Iterator[GpuInfo]:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        board = nvml.nvmlDeviceGetUUID(handle)
        parts: list[tuple[Handle, str, MigSlice | None]] = [*self._slices(board, handle)]
        for part, uuid, mig in parts or [(handle, board, None)]:
            yield GpuInfo(
                index=index,
                uuid=uuid,
                name=nvml.nvmlDeviceGetName(part),
                memory_total_bytes=int(self._memory(uuid, part).total),
                mig=mig,
            )

    def _processes(self, uuid: str, handle: Handle) -> tuple[GpuProcess, ...] | None:
        """None where the driver never tells. Any other failure is raised: silence must not pass for an idle GPU."""
        list_them = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        found = self._bound.supported(uuid, "processes", list_them, handle)
        if found is None:
            return None
        return tuple(GpuProcess(int(process.pid), process.usedGpuMemory) for process in found)

    def _memory(self, uuid: str, handle: Handle) -> Any:
        """Version 2 tells what nvidia-smi shows: version 1 counts the driver's own reserve as used."""
        second = self._bound.optional(
            uuid, "memory v2", self._nvml.nvmlDeviceGetMemoryInfo, handle, self._nvml.nvmlMemory_v2
        )
        return second if second is not None else self._nvml.nvmlDeviceGetMemoryInfo(handle)

    def _clock_reasons(self, handle: Handle) -> int:
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))  # its name before driver 535

    def _event(self, data: Any) -> GpuEvent | None:
        nvml = self._nvml
        kind = {
            nvml.nvmlEventTypeXidCriticalError: EventKind.XID,
            nvml.nvmlEventTypeDoubleBitEccError: EventKind.ECC_DOUBLE_BIT,
            self._bound.unavailable_event: EventKind.UNAVAILABLE,
        }.get(data.eventType)
        if kind is None:
            return None
        instance = int(data.gpuInstanceId)
        return GpuEvent(
            kind=kind,
            board=self._by_address.get(_address(data.device)),
            xid=int(data.eventData) if kind is EventKind.XID else None,
            gpu_instance=None if instance == _NO_INSTANCE else instance,
        )

    # ---- calls and their errors ----------------------------------------------------------------------------------

    def _must(self, what: str, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return call(*arguments)
        except self._nvml.NVMLError as error:
            raise DeviceError(f"NVML: {what}: {error}") from error

    # ---- init and shutdown ---------------------------------------------------------------------------------------

    def _ensure_open(self) -> None:
        if self._open:
            return
        if self._binding is None:
            self._binding = Binding()
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if error.value in self._bound.no_driver:
                raise NoDriverError(str(error)) from error
            raise DeviceError(
                f"NVML cannot be initialised: {error}; `nvidia-smi` should say the same, and a driver that was "
                "updated under its running kernel module needs a reboot"
            ) from error
        self._open, self._reopen, self._opened_at = True, False, self._clock()
        try:
            self._find_handles()
            self._listen()
        except nvml.NVMLError as error:
            self._close()
            raise DeviceError(f"NVML: {error}, right after it was initialised") from error

    def _close(self) -> None:
        self._handles, self._boards, self._by_address, self._events = {}, {}, {}, None
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()  # frees the event set too
            except self._nvml.NVMLError:
                return  # already uninitialised: that is what we want

    def _find_handles(self) -> None:
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                board = nvml.nvmlDeviceGetUUID(handle)
            except nvml.NVMLError:
                continue  # fell off the bus; whoever asks for it gets a GpuLost
            self._handles[board], self._boards[board] = handle, board
            self._by_address[_address(handle)] = board
            for part, uuid, _ in self._slices(board, handle):
                self._handles[uuid], self._boards[uuid] = part, board

    def _slices(self, board: str, handle: Handle) -> Iterator[tuple[Handle, str, MigSlice]]:
        nvml = self._nvml
        mode = self._bound.optional(board, "mig", nvml.nvmlDeviceGetMigMode, handle)
        if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return
        for index in range(self._bound.optional(board, "mig count", nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                gpu_instance = nvml.nvmlDeviceGetGpuInstanceId(part)
                compute_instance = nvml.nvmlDeviceGetComputeInstanceId(part)
                uuid = nvml.nvmlDeviceGetUUID(part)
            except nvml.NVMLError:
                continue  # this place of the board holds no slice
            yield part, uuid, MigSlice(board, gpu_instance, compute_instance)

    def _listen(self) -> None:
        nvml, optional = self._nvml, self._bound.optional
        self._events = optional("", "events", nvml.nvmlEventSetCreate)
        if self._events is None:
            return
        wanted = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
        wanted |= self._bound.unavailable_event
        for board in set(self._boards.values()):
            handle = self._handles[board]
            kinds = wanted & (optional(board, "event types", nvml.nvmlDeviceGetSupportedEventTypes, handle) or 0)
            if kinds:
                optional(board, "events", nvml.nvmlDeviceRegisterEvents, handle, kinds, self._events)


def _address(handle: Handle) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)
