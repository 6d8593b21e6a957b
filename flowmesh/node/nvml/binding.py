"""The driver's library and its binding (pynvml), loaded on first use, and what its error codes mean here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

LIBRARY = "libnvidia-ml.so.1"

T = TypeVar("T")


class NoDriverError(Exception):
    """Raised when this machine has no NVIDIA driver (or no library of it): a node without GPUs.

    Args:
        installed: whether the library is there, so that the driver may be loaded later.
    """

    def __init__(self, message: str, *, installed: bool = False) -> None:
        super().__init__(message)
        self.unusable = (f"the NVIDIA driver is installed and does not work: {message}",) if installed else ()
        """For `Inventory.unusable`."""


class Binding:
    """pynvml, and which of its calls are not supported here.

    Raises:
        NoDriverError: the library is not installed. pynvml is imported only where it is.
    """

    def __init__(self) -> None:
        try:
            ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NoDriverError(str(error)) from error
        import pynvml

        self.nvml: Any = pynvml
        self.no_driver = {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
        self.session_over = {
            pynvml.NVML_ERROR_UNINITIALIZED,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        }
        """Errors of the driver as a whole, not of a device: NVML must be initialised again."""
        self.never = {
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            pynvml.NVML_ERROR_DEPRECATED,
        }
        """Errors that a second call would return again."""
        self.unavailable_event: int = getattr(pynvml, "nvmlEventTypeGpuUnavailableError", 0)
        self._unsupported: set[tuple[str, str]] = set()

    def optional(self, uuid: str, name: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """The call's result; None where it is not supported (called once per device) or fails this time.

        Raises:
            NVMLError: the session is over.
        """
        try:
            return self.supported(uuid, name, call, *arguments)
        except self.nvml.NVMLError as error:
            if error.value in self.session_over:
                raise
            return None

    def supported(self, uuid: str, name: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """The call's result; None where it is not supported (called once per device).

        Raises:
            NVMLError: any other failure.
        """
        if (uuid, name) in self._unsupported:
            return None
        try:
            return call(*arguments)
        except self.nvml.NVMLError as error:
            if error.value not in self.never:
                raise
            self._unsupported.add((uuid, name))
            return None
