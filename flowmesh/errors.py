"""The errors that FlowMesh programs raise on purpose, and the exit code of each.

A message says on one line what was wrong, where, and what to do about it.
"""

EXIT_OK = 0
EXIT_FAILURE = 1
"""A task failed, or `flowmesh doctor` found something broken. Also the base class's: no better code applies."""
EXIT_USAGE = 2
"""The command line is wrong, as click reports it. A service manager should not restart the program."""
EXIT_UNAVAILABLE = 69
"""A required service, such as Redis or the node, does not answer (EX_UNAVAILABLE of sysexits.h)."""
EXIT_TRY_AGAIN = 75
"""Another process holds a required resource, or no worker is free; a later try may work (EX_TEMPFAIL)."""
EXIT_CONFIG = 78
"""A setting is wrong. A service manager should not restart the program (EX_CONFIG)."""
EXIT_BY_SIGNAL = 128
"""Plus the signal's number, as shells report it: a command that a signal interrupted."""
EXIT_INTERRUPTED = EXIT_BY_SIGNAL + 2
"""Ctrl-C (SIGINT)."""


class FlowMeshError(Exception):
    """Base class: an error whose message is meant for the user."""

    exit_code = EXIT_FAILURE


class ConfigError(FlowMeshError):
    """A setting cannot be used. Names the file or variable, the key, the value found and the values allowed."""

    exit_code = EXIT_CONFIG


class FieldError(FlowMeshError):
    """Fields of a document cannot be used.

    Args:
        message: about all of them.
        path: the dotted path of the first one, as the document's author wrote it.
        faults: a message for each field; empty: there is one.
    """

    def __init__(self, message: str, path: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path
        self.faults = faults or (message,)


class ProtocolError(FlowMeshError):
    """A peer (Redis, a fork server, a task's child) sent a message that its protocol does not define."""


class LaunchError(FlowMeshError):
    """A process could not be started."""


class NotOfferedError(FieldError):
    """A task type that this node knows and whose libraries are missing here: another worker may offer it."""


class DeviceError(FlowMeshError):
    """A GPU or the driver library failed, or did not answer in time."""


class DeliveryError(FlowMeshError):
    """A result or an artifact did not reach its destination. Everything is still on disk."""


class UnavailableError(FlowMeshError):
    """A required service does not answer."""

    exit_code = EXIT_UNAVAILABLE


class BusyError(FlowMeshError):
    """A required resource is in use; a later try may work."""

    exit_code = EXIT_TRY_AGAIN
