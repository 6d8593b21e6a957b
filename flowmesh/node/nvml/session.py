"""The blocking half of NVML: one session from init to shutdown, called by one thread only (see `nvml`).

A call that a device or driver does not support is made once, and its reading is None from then on. A device that does
not answer becomes a GpuLost; the others are still read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuEvent, GpuInfo, GpuLost, GpuReading, Inventory, MigSlice
from flowmesh.node.nvml.binding import Binding, NoDriverError
from flowmesh.node.nvml.events import EventSet
from flowmesh.node.nvml.handles import Handle, Handles
from flowmesh.node.nvml.reader import Reader

_EVENTS_KEPT = 256
_REOPEN_INTERVAL_S = 30.0
_LONGEST_REOPEN_INTERVAL_S = 960.0
"""A lost GPU comes back only with a new init, during which the other GPUs do not answer for a while: so the interval
between two attempts doubles up to this."""


class _Opened:
    """What is valid from one init to the next shutdown."""

    def __init__(self, binding: Binding, at_s: float) -> None:
        self.at_s = at_s
        self.handles = Handles(binding)
        self.events = EventSet(binding, self.handles)


class Session:
    """NVML, initialised by the first call, and again whenever the driver has lost its state."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._binding: Binding | None = None
        self.opening = False
        """Whether the driver is being initialised now, which takes seconds per GPU without persistence mode."""
        self._opened: _Opened | None = None
        self._pending: list[GpuEvent] = []
        """Events of an earlier init that `events` has not returned yet."""
        self._lost: set[str] = set()
        self._reopen_interval_s = _REOPEN_INTERVAL_S

    def inventory(self) -> Inventory:
        """All GPUs of the machine.

        Raises:
            NoDriverError: there is no driver.
            DeviceError: there is one, and it does not work.
        """
        handles = self._open().handles
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise DeviceError(f"NVML: number of GPUs: {error}") from error
        gpus: list[GpuInfo] = []
        unusable: list[str] = []
        for index in range(count):
            try:
                found = self._describe(handles, index)
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

    def sample(self, uuids: Sequence[str], *, memory_only: bool = False) -> dict[str, GpuReading]:
        """One reading of each GPU.

        Args:
            memory_only: read used bytes and processes only.

        Raises:
            DeviceError: the driver itself does not work.
        """
        self._reopen_if_due()
        handles = self._open().handles
        try:
            return {uuid: self._read(handles, uuid, memory_only) for uuid in uuids}
        except self._nvml.NVMLError:
            self._close()  # the driver has lost its state, as after a reload: initialise once more
        handles = self._open().handles
        try:
            return {uuid: self._read(handles, uuid, memory_only) for uuid in uuids}
        except self._nvml.NVMLError as error:
            self._close()
            raise DeviceError(f"NVML: {error}, also after it was initialised again") from error

    def events(self) -> tuple[GpuEvent, ...]:
        """The critical events since the last call.

        Raises:
            DeviceError: as for `sample`.
        """
        self._take_events(self._open())
        events, self._pending = tuple(self._pending), []
        return events

    def close(self) -> None:
        self._close()

    @property
    def _bound(self) -> Binding:
        assert self._binding is not None, "_open comes first"
        return self._binding

    @property
    def _nvml(self) -> Any:
        return self._bound.nvml

    def _read(self, handles: Handles, uuid: str, memory_only: bool) -> GpuReading:
        handle = handles.by_uuid.get(uuid)
        if handle is None:
            self._lost.add(uuid)  # the next init may find it
            return GpuLost(uuid, "the driver no longer lists it")
        board = handles.board_of[uuid]
        reader = Reader(self._bound)
        try:
            brief = reader.brief(uuid, board, handle)
        except self._nvml.NVMLError as error:
            if error.value in self._bound.session_over:
                raise
            self._lost.add(uuid)
            return GpuLost(uuid, str(error))
        self._lost.discard(uuid)
        return brief if memory_only else reader.rest(brief, handle, handles.by_uuid.get(board, handle))

    def _describe(self, handles: Handles, index: int) -> list[GpuInfo]:
        """The GPU; where MIG mode is on its slices instead (CUDA cannot use the whole one then), perhaps none."""
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        board = nvml.nvmlDeviceGetUUID(handle)
        parts: list[tuple[Handle, str, MigSlice | None]] = [(handle, board, None)]
        if handles.is_sliced(board, handle):
            parts = [*handles.slices(board, handle)]
        capability = self._bound.optional(board, "capability", nvml.nvmlDeviceGetCudaComputeCapability, handle)
        return [
            GpuInfo(
                index=index,
                uuid=uuid,
                name=nvml.nvmlDeviceGetName(part),
                memory_total_bytes=int(Reader(self._bound).memory(uuid, part).total),
                capability=None if capability is None else (int(capability[0]), int(capability[1])),
                mig=mig,
            )
            for part, uuid, mig in parts
        ]

    def _take_events(self, opened: _Opened) -> None:
        self._pending += opened.events.take(_EVENTS_KEPT - len(self._pending))

    def _open(self) -> _Opened:
        if self._opened is not None:
            return self._opened
        if self._binding is None:
            self._binding = Binding()
        self.opening = True
        try:
            self._opened = self._init(self._binding)
        finally:
            self.opening = False
        return self._opened

    def _init(self, binding: Binding) -> _Opened:
        nvml = binding.nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if error.value in binding.no_driver:
                raise NoDriverError(str(error), installed=True) from error
            raise DeviceError(
                f"NVML cannot be initialised: {error}; where `nvidia-smi` reports the same, reboot (the driver was "
                "updated under its running kernel module), else restart this node"
            ) from error
        try:
            return _Opened(binding, self._clock())
        except nvml.NVMLError as error:
            self._shutdown()
            raise DeviceError(f"NVML: {error}, right after it was initialised") from error

    def _reopen_if_due(self) -> None:
        """Shut down where a new init may find a lost GPU or bring events back; waiting events are kept."""
        opened = self._opened
        if opened is None or not (self._lost or opened.events.broken):
            return
        if self._clock() - opened.at_s < self._reopen_interval_s:
            return
        self._take_events(opened)
        self._close()
        longer_s = min(self._reopen_interval_s * 2, _LONGEST_REOPEN_INTERVAL_S)
        self._reopen_interval_s = longer_s if self._lost else _REOPEN_INTERVAL_S
        self._lost = set()

    def _close(self) -> None:
        if self._opened is not None:
            self._opened = None
            self._shutdown()

    def _shutdown(self) -> None:
        try:
            self._nvml.nvmlShutdown()  # frees the event set too
        except self._nvml.NVMLError:
            return  # not initialised any more, which is the goal
