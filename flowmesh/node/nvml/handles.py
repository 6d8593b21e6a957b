"""NVML's handles: boards and MIG slices by UUID, as they are from one init to the next."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from flowmesh.node.devices import MigSlice
from flowmesh.node.nvml.binding import Binding

Handle = Any


class Handles:
    """All boards that the driver lists, and their slices. A board that does not answer is left out.

    Raises:
        NVMLError: the driver cannot list its boards.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self.by_uuid: dict[str, Handle] = {}
        self.board_of: dict[str, str] = {}
        """The board's UUID, by the UUID of the board itself and of each slice."""
        self._board_at: dict[int, str] = {}
        nvml = binding.nvml
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                board = nvml.nvmlDeviceGetUUID(handle)
            except nvml.NVMLError:
                continue  # off the bus; a sample of it is a GpuLost
            self.by_uuid[board], self.board_of[board] = handle, board
            self._board_at[_address(handle)] = board
            for part, uuid, _ in self.slices(board, handle):
                self.by_uuid[uuid], self.board_of[uuid] = part, board

    def boards(self) -> dict[str, Handle]:
        """Handles of whole boards, by UUID."""
        return {board: self.by_uuid[board] for board in self._board_at.values()}

    def board_at(self, handle: Handle) -> str | None:
        """The UUID of the board that a handle from elsewhere points to, without asking the driver."""
        return self._board_at.get(_address(handle))

    def is_sliced(self, board: str, handle: Handle) -> bool:
        """Whether MIG mode is on."""
        nvml = self._binding.nvml
        mode = self._binding.optional(board, "mig", nvml.nvmlDeviceGetMigMode, handle)
        return mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE

    def slices(self, board: str, handle: Handle) -> Iterator[tuple[Handle, str, MigSlice]]:
        """A board's MIG devices: handle, UUID, place. None where MIG mode is off."""
        nvml = self._binding.nvml
        if not self.is_sliced(board, handle):
            return
        most = self._binding.optional(board, "mig count", nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        for index in range(most):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                gpu_instance = nvml.nvmlDeviceGetGpuInstanceId(part)
                compute_instance = nvml.nvmlDeviceGetComputeInstanceId(part)
                uuid = nvml.nvmlDeviceGetUUID(part)
            except nvml.NVMLError:
                continue  # no slice has this index
            yield part, uuid, MigSlice(board, gpu_instance, compute_instance)


def _address(handle: Handle) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)
