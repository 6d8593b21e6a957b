"""Runs a command and turns its errors into one line on standard error and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from flowmesh.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, FlowMeshError


def guarded(command: Callable[[], object], program: str = "flowmesh") -> int:
    """Run `command` and return the exit code. Errors other than FlowMeshError and click's are bugs and get through.

    Args:
        command: returns an exit code, or anything else for success.
        program: the name that starts an error line.
    """
    try:
        code = command()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except FlowMeshError as error:
        from flowmesh.messages.text import escaped  # imports msgspec, which --help need not wait for

        print(f"{program}:", escaped(" ".join(str(error).split())), file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else EXIT_OK


def piped(command: Callable[[], object]) -> int:
    """Run a command that prints; returns EXIT_FAILURE where the reader closed its end, as in `flowmesh workers | head`.

    Not for the node: a broken pipe there is a bug that must show.
    """
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return code if isinstance(code, int) else EXIT_OK
