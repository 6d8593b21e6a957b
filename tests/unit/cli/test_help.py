"""Help texts: complete, short enough for a terminal, and in the words that operators use."""

from __future__ import annotations

import re

import click
import pytest

from flowmesh.cli.main import COMMANDS, cli
from flowmesh.cli.supervisor import command as supervisor

OWN_WORDS = re.compile(r"\b(tell|tells|say|says|anew|mend|mends|word|whoever|nobody|hear|stranger|let this)\b", re.I)


def command_named(name: str) -> click.Command:
    found = supervisor if name == "flowmesh-supervisor" else cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def help_of(name: str, width: int) -> str:
    command = command_named(name)
    return command.get_help(click.Context(command, info_name=name, terminal_width=width))


@pytest.mark.parametrize("name", [*COMMANDS, "flowmesh-supervisor"])
def test_every_command_and_option_has_help(name: str) -> None:
    command = command_named(name)
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    texts = [command.help or "", *(option.help or "" for option in options)]
    assert all(text.strip().endswith(".") or "conf/node.toml" in text for text in texts), texts
    assert not OWN_WORDS.search(" ".join(texts))


@pytest.mark.parametrize("name", [*COMMANDS, "flowmesh-supervisor"])
@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_the_terminal(name: str, width: int) -> None:
    assert all(len(line) <= width for line in help_of(name, width).splitlines())


def test_the_list_of_commands_fits_80_columns() -> None:
    lines = cli.get_help(click.Context(cli, info_name="flowmesh", terminal_width=80)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len([line for line in lines if line.split()[:1] and line.split()[0] in COMMANDS]) == len(COMMANDS)
    assert not OWN_WORDS.search(" ".join(line for _, line in COMMANDS.values()))
