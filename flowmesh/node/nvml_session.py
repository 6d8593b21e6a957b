"""The blocking half of NVML: one session from init to shutdown, called by one thread only (see `nvml`).

A call that a device or driver does not support is asked once and is None from then on; a device that
does not answer becomes a GpuLost and leaves the others alone.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flowmesh.errors import DeviceError
from flowmesh.node.devices import (
    EventKind,
    GpuEvent,
    GpuInfo,
    GpuLost,
    Inventory,
    Look,
    MigSlice,
)
from flowmesh.node.nvml_binding import Binding, NoDriverError
from flowmesh.node.nvml_reader import Handle, Reader

_EVENT_WAIT_MS = 1
_EVENTS_AT_ONCE = 256
_NO_INSTANCE = 0xFFFFFFFF
_REOPEN_INTERVAL_S = 30.0
_LONGEST_REOPEN_INTERVAL_S = 960.0
"""A lost GPU comes back with a new init only, and that one costs the other GPUs their answers for a while: it is tried
less and less often."""

T = TypeVar("T")


class Session:
    """NVML, initialised as late as possible and again whenever the driver forgot us."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._binding: Binding | None = None
        self.opening = False
        """Whether the driver is being initialised just now, which takes seconds a card without persistence mode."""
        self._open = False
        self._opened_at = 0.0
        self._handles: dict[str, Handle] = {}
        self._boards: dict[str, str] = {}
        self._by_address: dict[int, str] = {}
        self._events: Any = None
        self._heard: list[GpuEvent] = []
        """Events taken from a session that was closed before anybody asked for them."""
        self._deaf = False
        self._lost: set[str] = set()
        self._reopen_interval_s = _REOPEN_INTERVAL_S

    @property
    def _bound(self) -> Binding:
        assert self._binding is not None, "_ensure_open comes first"
        return self._binding

    @property
    def _nvml(self) -> Any:
        return self._bound.nvml

    @property
    def _reader(self) -> Reader:
        return Reader(self._bound)

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
                found = self._describe(index)
            except nvml.NVMLError as error:
                unusable.append(f"GPU {index}: {error}")
                continue
            gpus += found
            if not found:
                unusable.append(f"GPU {index}: MIG mode is on, and it has no slice that CUDA could use")
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
        if (self._lost or self._deaf) and self._clock() - self._opened_at >= self._reopen_interval_s:
            self._reopen()
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
        self._listen()
        heard, self._heard = tuple(self._heard), []
        return heard

    def close(self) -> None:
        self._close()

    # ---- one device ----------------------------------------------------------------------------------------------

    def _look(self, uuid: str, memory_only: bool) -> Look:
        handle = self._handles.get(uuid)
        if handle is None:
            self._lost.add(uuid)  # it may be back after the next init
            return GpuLost(uuid, "the driver no longer lists it")
        board = self._boards[uuid]
        try:
            brief = self._reader.brief(uuid, board, handle)
        except self._nvml.NVMLError as error:
            if error.value in self._bound.session_over:
                raise
            self._lost.add(uuid)
            return GpuLost(uuid, str(error))
        self._lost.discard(uuid)
        return brief if memory_only else self._reader.rest(brief, handle, self._handles.get(board, handle))

    def _describe(self, index: int) -> list[GpuInfo]:
        """The GPU, or its slices where it is cut into some: then CUDA takes no whole one, and with no slice nothing."""
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        board = nvml.nvmlDeviceGetUUID(handle)
        parts: list[tuple[Handle, str, MigSlice | None]] = [(handle, board, None)]
        if self._is_cut(board, handle):
            parts = [*self._slices(board, handle)]
        return [
            GpuInfo(
                index=index,
                uuid=uuid,
                name=nvml.nvmlDeviceGetName(part),
                memory_total_bytes=int(self._reader.memory(uuid, part).total),
                mig=mig,
            )
            for part, uuid, mig in parts
        ]

    def _listen(self) -> None:
        nvml = self._nvml
        while self._events is not None and len(self._heard) < _EVENTS_AT_ONCE:
            try:
                data = nvml.nvmlEventSetWait_v2(self._events, _EVENT_WAIT_MS)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_TIMEOUT:
                    self._deaf = True  # a lost GPU or a reloaded driver: `sample` tells which
                break
            if (event := self._event(data)) is not None:
                self._heard.append(event)

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
        board = self._by_address.get(_address(data.device))
        if board is None:
            board = self._bound.optional("", "uuid of an event's device", nvml.nvmlDeviceGetUUID, data.device)
        return GpuEvent(
            kind=kind,
            board=board,
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
        self.opening = True
        try:
            self._greet()
        finally:
            self.opening = False

    def _greet(self) -> None:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if error.value in self._bound.no_driver:
                raise NoDriverError(str(error)) from error
            raise DeviceError(
                f"NVML cannot be initialised: {error}; where `nvidia-smi` says the same, reboot (a driver was updated "
                "under its running kernel module), else restart this node"
            ) from error
        self._open, self._opened_at = True, self._clock()
        try:
            self._find_handles()
            self._subscribe()
        except nvml.NVMLError as error:
            self._close()
            raise DeviceError(f"NVML: {error}, right after it was initialised") from error

    def _reopen(self) -> None:
        """Greet the driver anew with the next question, to find what is lost. What waits to be heard is kept."""
        self._listen()
        self._close()
        longer_s = min(self._reopen_interval_s * 2, _LONGEST_REOPEN_INTERVAL_S)
        self._reopen_interval_s = longer_s if self._lost else _REOPEN_INTERVAL_S
        self._lost, self._deaf = set(), False

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

    def _is_cut(self, board: str, handle: Handle) -> bool:
        mode = self._bound.optional(board, "mig", self._nvml.nvmlDeviceGetMigMode, handle)
        return mode is not None and mode[0] == self._nvml.NVML_DEVICE_MIG_ENABLE

    def _slices(self, board: str, handle: Handle) -> Iterator[tuple[Handle, str, MigSlice]]:
        nvml = self._nvml
        if not self._is_cut(board, handle):
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

    def _subscribe(self) -> None:
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
