"""`flowmesh`: the command line. Each command's module is imported only when that command runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import click

from flowmesh import __version__
from flowmesh.errors import EXIT_FAILURE, EXIT_OK, FlowMeshError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("flowmesh.cli.run:run", "Run task files on this machine, with nothing else running."),
    "submit": ("flowmesh.cli.submit:submit", "Send a task file to a running deployment."),
    "workers": ("flowmesh.cli.workers:workers", "List the workers of a deployment."),
    "status": ("flowmesh.cli.node_commands:status", "Show the node of this machine and its tasks."),
    "logs": ("flowmesh.cli.logs:logs", "Print the logs of a task of this machine's node."),
    "cancel": ("flowmesh.cli.node_commands:cancel", "Cancel a task of this machine's node."),
    "deliver": ("flowmesh.cli.node_commands:deliver", "Send a task's results again that did not arrive."),
    "drain": ("flowmesh.cli.node_commands:drain", "Let this machine's node take no more tasks."),
    "recycle": ("flowmesh.cli.node_commands:recycle", "Have fork servers import their libraries anew."),
    "doctor": ("flowmesh.cli.doctor:doctor", "Look at this machine as a node would: what is fine, what is not."),
    "upgrade": ("flowmesh.cli.node_commands:upgrade", "Start the node's program anew; its tasks run on."),
}
"""Name → (`module:attribute` of its click command, one line for `flowmesh --help`)."""


class LazyGroup(click.Group):
    """A group that knows its commands by name alone until one is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    name="flowmesh",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Run GPU tasks on this machine, or send them to a FlowMesh deployment.",
)
@click.version_option(__version__, prog_name="flowmesh", message="%(prog)s %(version)s")
def cli() -> None:
    """The group; its commands are in COMMANDS."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process with one of the codes of flowmesh.errors."""
    sys.exit(guarded(lambda: cli.main(args=arguments, prog_name="flowmesh", standalone_mode=False)))


def guarded(command: Callable[[], object]) -> int:
    """Run a command; what it raises on purpose becomes one line on standard error and an exit code."""
    try:
        code = command()
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("flowmesh: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except FlowMeshError as error:
        print("flowmesh:", " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `flowmesh workers | head -1`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return code if isinstance(code, int) else EXIT_OK


if __name__ == "__main__":
    main()
