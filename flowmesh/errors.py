"""Every error that a FlowMesh program raises on purpose, and the exit code that each one ends with.

A message says what was wrong, where it stood, and what to do about it, in one line.
"""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2  # the command line itself was wrong
EXIT_UNAVAILABLE = 69  # a service that is needed does not answer (sysexits EX_UNAVAILABLE)
EXIT_TRY_AGAIN = 75  # somebody else holds what is needed; later it may work (EX_TEMPFAIL)
EXIT_CONFIG = 78  # a setting is wrong; a restart will not help (EX_CONFIG)


class FlowMeshError(Exception):
    """The root of the tree: an error whose message is meant for a person."""

    exit_code = EXIT_FAILURE


class ConfigError(FlowMeshError):
    """A setting cannot be used. Names the file or variable, the key, what was found and what is allowed."""

    exit_code = EXIT_CONFIG


class FieldError(FlowMeshError):
    """A document has a field that cannot be used. `path` is dotted, as the document's author wrote it."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class ProtocolError(FlowMeshError):
    """A peer (Redis, a fork server, a task's child) said something that its protocol does not have."""


class LaunchError(FlowMeshError):
    """A process could not be started."""


class DeviceError(FlowMeshError):
    """A GPU, or the driver's library, did not answer as it should."""


class DeliveryError(FlowMeshError):
    """A result or an artifact did not reach its destination. Everything is still on disk."""


class UnavailableError(FlowMeshError):
    """A service that the command needs is not there."""

    exit_code = EXIT_UNAVAILABLE


class BusyError(FlowMeshError):
    """Another process holds what this one needs."""

    exit_code = EXIT_TRY_AGAIN
