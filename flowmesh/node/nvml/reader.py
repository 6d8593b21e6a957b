"""NVML's readings of one device: bytes, processes, power, temperature. Called by the session's thread only."""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.node.devices import GpuProcess, GpuSample
from flowmesh.node.nvml.binding import Binding
from flowmesh.node.nvml.handles import Handle

# nvmlClocksEventReasons that make a GPU slower than it could be; idling and user-set clocks are not among them.
_THROTTLING = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}


class Reader:
    """Reads devices by their handles.

    Raises (from its methods):
        NVMLError: the device or the driver does not answer.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._nvml = binding.nvml

    def brief(self, uuid: str, board: str, handle: Handle) -> GpuSample:
        """Used bytes and processes only."""
        memory = self.memory(uuid, handle)
        processes = self._processes(uuid, handle)
        return GpuSample(
            uuid=uuid,
            board=board,
            used_bytes=int(memory.used),
            processes=processes,
            graphics=self._graphics(uuid, handle, processes or ()),
        )

    def rest(self, brief: GpuSample, handle: Handle, whole: Handle) -> GpuSample:
        """`brief` with utilization, power, energy, temperature and throttling added.

        Args:
            whole: the handle of its board, which has one power reading and one temperature for all its slices.
        """
        nvml, uuid, board = self._nvml, brief.uuid, brief.board
        utilization = self._binding.optional(uuid, "utilization", nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._binding.optional(board, "power", nvml.nvmlDeviceGetPowerUsage, whole)
        reasons = self._binding.optional(board, "clock reasons", self._clock_reasons, whole) or 0
        return msgspec.structs.replace(
            brief,
            utilization_percent=None if utilization is None else int(utilization.gpu),
            power_w=None if power_mw is None else power_mw / 1000,
            energy_mj=self._binding.optional(board, "energy", nvml.nvmlDeviceGetTotalEnergyConsumption, whole),
            temperature_c=self._binding.optional(
                board, "temperature", nvml.nvmlDeviceGetTemperature, whole, nvml.NVML_TEMPERATURE_GPU
            ),
            throttled=tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        )

    def memory(self, uuid: str, handle: Handle) -> Any:
        """Version 2 gives what nvidia-smi shows. Version 1, for older drivers, counts the driver's reserve as used."""
        nvml = self._nvml
        second = self._binding.supported(uuid, "memory v2", nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        return second if second is not None else nvml.nvmlDeviceGetMemoryInfo(handle)

    def _processes(self, uuid: str, handle: Handle) -> tuple[GpuProcess, ...] | None:
        """None where the driver never lists them. Any other failure is raised: it must not pass for an idle GPU."""
        list_them = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        found = self._binding.supported(uuid, "processes", list_them, handle)
        if found is None:
            return None
        return tuple(map(_process, found))

    def _graphics(self, uuid: str, handle: Handle, computing: tuple[GpuProcess, ...]) -> tuple[GpuProcess, ...]:
        list_them = self._nvml.nvmlDeviceGetGraphicsRunningProcesses_v3
        found = self._binding.optional(uuid, "graphics processes", list_them, handle) or ()
        listed = {process.pid for process in computing}  # a process that does both is in both lists
        return tuple(_process(process) for process in found if process.pid not in listed)

    def _clock_reasons(self, handle: Handle) -> int:
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))  # the name before driver 535


def _process(found: Any) -> GpuProcess:
    """A context is never empty: a driver that cannot attribute memory to the process reports 0 bytes."""
    return GpuProcess(int(found.pid), found.usedGpuMemory or None)
