"""`flowmesh completion SHELL`: prints the script that teaches a shell to complete this command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from flowmesh.errors import EXIT_OK

PROGRAMS, VARIABLE = ("flowmesh", "flowmesh-node"), "_FLOWMESH_COMPLETE"
HOW = {
    "bash": 'add to ~/.bashrc:  eval "$(flowmesh completion bash)"',
    "zsh": 'add to ~/.zshrc, after compinit:  eval "$(flowmesh completion zsh)"',
    "fish": "run once:  flowmesh completion fish > ~/.config/fish/conf.d/flowmesh.fish",
}


@click.command(
    help="Print the script with which SHELL completes commands, options, and ids of tasks and workers. Its first line "
    "is how to install it."
)
@click.argument("shell", type=click.Choice(list(HOW)))
def completion(shell: str) -> int:
    """Run the command; returns the exit code."""
    from flowmesh.cli.main import cli

    made = get_completion_class(shell)
    assert made is not None, "click knows these shells"
    print(f"# {HOW[shell]}")
    for program in PROGRAMS:
        print(made(cli, {}, program, VARIABLE).source())
    return EXIT_OK
