"""`flowmesh`: the command line. The module of a command is imported only when that command runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from flowmesh.cli.guard import guarded, piped
from flowmesh.cli.version import version_option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("flowmesh.cli.run:run", "Run task files on this machine; needs no Redis and no node."),
    "exec": ("flowmesh.cli.exec:execute", "Run one command on this machine as a task, in this terminal."),
    "serve": ("flowmesh.cli.serve:serve", "Serve a model on this machine, with an address and a key."),
    "submit": ("flowmesh.cli.submit:submit", "Send a task file to an idle worker, or queue files for one."),
    "validate": ("flowmesh.cli.validate:validate", "Check task files and settings; each error with its line."),
    "schema": ("flowmesh.cli.schema:schema", "Print a JSON Schema of task, agent or node files."),
    "workers": ("flowmesh.cli.workers:workers", "List the workers of a deployment."),
    "ps": ("flowmesh.cli.fleet:ps", "List the tasks of a deployment that wait or run."),
    "wait": ("flowmesh.cli.fleet:wait", "Wait until tasks have ended."),
    "result": ("flowmesh.cli.fleet:result", "Print the result of a queued or submitted task."),
    "queue": ("flowmesh.cli.waiting:queue", "Show what waits in the queue, or remove tasks from it."),
    "status": ("flowmesh.cli.node_commands:status", "Show the node on this machine: workers, tasks, Redis."),
    "history": ("flowmesh.cli.history:history", "List the tasks that ended on this node, with sums."),
    "show": ("flowmesh.cli.show:show", "Show everything about one task of this node."),
    "replay": ("flowmesh.cli.replay:replay", "Run a task of the history again, and compare."),
    "top": ("flowmesh.cli.top.command:top", "Watch GPUs, tasks and queue of this node or of a deployment."),
    "metrics": ("flowmesh.cli.node_commands:metrics", "Print the node's metrics for Prometheus."),
    "notify": ("flowmesh.cli.notify:notify", "Show where notifications go, or send a test."),
    "logs": ("flowmesh.cli.logs:logs", "Print the logs of a task, on this node or any other."),
    "cancel": ("flowmesh.cli.cancel:cancel", "Cancel a task, on this node or any other."),
    "deliver": ("flowmesh.cli.node_commands:deliver", "Retry the delivery of a task's results."),
    "drain": ("flowmesh.cli.node_commands:drain", "Stop accepting tasks, and exit when running ones finish."),
    "recycle": ("flowmesh.cli.node_commands:recycle", "Replace fork servers, to import changed packages."),
    "scale": ("flowmesh.cli.scale:scale", "Bring nodes as Slurm jobs while tasks wait."),
    "init": ("flowmesh.cli.init:init", "Set up a node on this machine: files, user, folders."),
    "cost": ("flowmesh.cli.cost:cost", "Show what the tasks of this node have cost."),
    "loss": ("flowmesh.cli.loss:loss", "Show the loss of a training task, as a chart."),
    "completion": ("flowmesh.cli.completion:completion", "Print the script for a shell's completion."),
    "examples": ("flowmesh.cli.examples:examples", "List the example tasks, or print one of them."),
    "doctor": ("flowmesh.cli.doctor:doctor", "Check this machine and its settings; print fixes."),
    "upgrade": ("flowmesh.cli.node_commands:upgrade", "Restart the node's program; running tasks continue."),
}
"""Name → (`module:attribute` of its click command, one line for `flowmesh --help`)."""


class LazyGroup(click.Group):
    """A group that imports a command only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Without importing the commands, as click would for their help."""
        from click.shell_completion import CompletionItem

        commands = [
            CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    name="flowmesh",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Run GPU tasks on this machine, or send them to a FlowMesh deployment.",
)
@version_option("flowmesh")
def cli() -> None:
    """The group; its commands are in COMMANDS."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exits with one of the codes in flowmesh.errors."""
    command = partial(cli.main, args=arguments, prog_name="flowmesh", standalone_mode=False)
    sys.exit(guarded(lambda: piped(command)))


if __name__ == "__main__":
    main()
