"""`flowmesh schema`: prints the JSON Schema of tasks, pipelines, configurations of agents, or the node's file."""

from __future__ import annotations

import json
from typing import Literal

import click

from flowmesh.errors import EXIT_OK
from flowmesh.pipelines.schema import pipeline_schema
from flowmesh.tasks import schemas

MAKERS = {
    "task": schemas.task_schema,
    "pipeline": pipeline_schema,
    "agent": schemas.agent_schema,
    "node": schemas.node_schema,
}


@click.command(help="Print the JSON Schema of tasks, of pipelines, of configurations of agents, or of the node's file.")
@click.argument("kind", type=click.Choice(list(MAKERS)))
def schema(*, kind: Literal["task", "pipeline", "agent", "node"]) -> int:
    """Run the command; returns the exit code."""
    print(text_of(kind), end="")
    return EXIT_OK


def text_of(kind: str) -> str:
    """The schema as it is printed, and shipped in conf/schema."""
    return json.dumps(MAKERS[kind](), indent=1, ensure_ascii=False) + "\n"
