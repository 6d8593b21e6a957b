"""`flowmesh serve`: serves a model on this machine as a task, until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from flowmesh.cli import locate, render
from flowmesh.cli.control import Control
from flowmesh.cli.control_types import Endpoint, PhaseSeen, Seen
from flowmesh.cli.deployment import TaskFailed
from flowmesh.cli.documents import Submission
from flowmesh.cli.follow import Follow, Outcome
from flowmesh.cli.hand_over import absolute, choose
from flowmesh.cli.local import LocalNode, LocalOptions
from flowmesh.cli.signals import Interrupted, Signals
from flowmesh.cli.view import View, progress_stream, view_for
from flowmesh.errors import EXIT_OK, FlowMeshError

SECONDS = click.FloatRange(min=0, min_open=True)


@click.command(
    help="Serve a model on this machine, as an endpoint of OpenAI's API with a key of its own: on the node that runs "
    "here, else on a temporary one. Prints the address and the key, and ends with Ctrl-C."
)
@click.argument("model", metavar="MODEL")
@click.option("--name", metavar="NAME", help="What requests call the model; default: MODEL.")
@click.option("--host", default="127.0.0.1", metavar="IP", help="Listen there; default: 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--revision", metavar="REVISION", help="Of a model of the hub.")
@click.option("--dtype", metavar="DTYPE", help="auto, float16, bfloat16 or float32.")
@click.option("--engine", type=click.Choice(["auto", "transformers", "vllm"]), default="auto", help="Default: auto.")
@click.option("--ttl", type=SECONDS, metavar="SECONDS", help="End this long after the model is ready.")
@click.option("--idle", type=SECONDS, metavar="SECONDS", help="End after so long without a request.")
@locate.config_option
@click.option("--embedded", is_flag=True, help="Use a temporary node, also where a node runs on this machine.")
@locate.json_option
def serve(
    *,
    model: str,
    name: str | None,
    host: str,
    port: int,
    revision: str | None,
    dtype: str | None,
    engine: str,
    ttl: float | None,
    idle: float | None,
    config: str | None,
    embedded: bool,
    as_json: bool,
) -> int:
    """Run the command; returns the exit code."""
    fields = {"host": host, "port": port, "served_model_name": name, "ttl_s": ttl, "idle_s": idle}
    spec: dict[str, Any] = {
        "taskType": "serve",
        "engine": engine,
        "model": {"source": {"identifier": model, **({} if revision is None else {"revision": revision})}},
        "serve": {key: value for key, value in fields.items() if value is not None},
    }
    if dtype is not None:
        spec["model"]["transformers"] = {"dtype": dtype}
    submission = Submission(
        source="flowmesh serve", task_id=f"serve-{secrets.token_hex(8)}", document=absolute({"spec": spec})
    )
    roots = (str(Path(model).expanduser().resolve()),) if Path(model).expanduser().is_dir() else ()
    options = LocalOptions(config=config, read_roots=roots, settings={"tasks.allow_serve": host}, keeps_results=False)
    outcome = _run(submission, options, embedded=embedded, as_json=as_json)
    if as_json:
        render.print_json(msgspec.to_builtins(outcome))
    if not outcome.ok:
        raise TaskFailed.of(outcome.task_id, outcome.verdict, outcome.error)
    if not as_json and isinstance(outcome.result, dict):
        print(f"served {render.count(int(outcome.result.get('requests', 0)), 'request')}")
    return EXIT_OK


def _run(submission: Submission, options: LocalOptions, *, embedded: bool, as_json: bool) -> Outcome:
    happened: queue.SimpleQueue[Any] = queue.SimpleQueue()
    view = view_for(progress_stream(as_json=as_json))
    choice = None if embedded else choose(options, [submission])
    with Signals(happened).handled() as signals, contextlib.ExitStack() as stack:
        stack.callback(view.stop)
        if choice is not None and choice.why:
            view.note(choice.why)
        if choice is not None and choice.node is not None:
            shown = _Shown(view, choice.node.state_dir, submission.task_id, as_json=as_json)
            outcome = choice.node.run(submission, happened=happened, signals=signals, seen=shown.seen)
            return _not_interrupted(outcome, signals)
        view.step("starting the node")
        node = stack.enter_context(LocalNode(options, lambda: signals.count > 1))
        worker = node.wait_idle(signals.check)
        shown = _Shown(view, node.state_dir, submission.task_id, as_json=as_json)
        outcome = Follow(node, submission, worker, view=shown, happened=happened, signals=signals, timeout_s=None).run()
        return _not_interrupted(outcome, signals)


def _not_interrupted(outcome: Outcome, signals: Signals) -> Outcome:
    """The outcome. Raises Interrupted where Ctrl-C came before the model was served."""
    if signals.count and outcome.verdict == "cancelled":
        raise Interrupted(signals.last, "interrupted before the model was served")
    return outcome


class _Shown:
    """A view that also prints where the model is served, once it is."""

    def __init__(self, view: View, state_dir: Path, task_id: str, *, as_json: bool) -> None:
        self._view = view
        self._state_dir = state_dir
        self._task_id = task_id
        self._as_json = as_json
        self.step = view.step
        self.note = view.note
        self.stop = view.stop

    def seen(self, event: Seen) -> None:
        if not isinstance(event, PhaseSeen) or event.endpoint is None:
            self._view.seen(event)
            return
        self._view.stop()
        try:
            with Control(self._state_dir) as control:
                endpoint = control.endpoint(self._task_id)
        except FlowMeshError as error:  # it may have ended meanwhile; its outcome follows
            self._view.note(str(error))
            return
        if self._as_json:
            render.print_json(msgspec.to_builtins(endpoint))
        else:
            print("\n".join(lines(endpoint)))
        sys.stdout.flush()


def lines(endpoint: Endpoint) -> list[str]:
    """What a person needs to use an endpoint."""
    body = json.dumps({"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    quoted = body.replace("'", "'\\''")
    return [
        f"model     {endpoint.model}",
        f"base URL  {endpoint.base_url}",
        f"key       {endpoint.api_key}",
        f"curl {endpoint.base_url}/chat/completions -H 'Authorization: Bearer {endpoint.api_key}' "
        f"-H 'Content-Type: application/json' -d '{quoted}'",
    ]
