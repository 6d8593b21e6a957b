"""The `serve` section of a task's document, and what a document of this type may say otherwise."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.fields import Faults, check_spec
from runners.inference.options import InferenceOptions
from runners.inference.task import InferenceTask, read_task
from runners.models.adapters import LocalAdapter
from runners.models.spec import Section

MODEL_FIELDS = ("model", "checkpoint", "engine", "enforce_cpu")
"""Fields that mean what they mean in a task of the type inference."""
OWN_FIELDS = (*MODEL_FIELDS, "serve")
MAX_NAME = 200
Seconds = Annotated[float, Meta(gt=0, le=10**8)]


class Serve(Section, frozen=True):
    """spec.serve"""

    host: str = "127.0.0.1"
    """The address that it listens on, an IP address."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0: a free one."""
    served_model_name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)] | None = None
    """The name that requests give the model. None: `model.source.identifier`."""
    ttl_s: Seconds | None = None
    """End this long after it was ready. None: no limit."""
    idle_s: Seconds | None = None
    """End after so long without a request to the model. None: no limit."""
    health_interval_s: Seconds = 30.0
    """Between two short completions that check the server while nobody uses it."""
    tool_call_parser: Annotated[str, Meta(min_length=1)] | None = None
    """vLLM: how the model writes calls of tools. None: they stay in the text of the answer."""
    restarts: Annotated[int, Meta(ge=0, le=1000)] = 3
    """How often a model that was served is loaded again, at the same address, after its server was lost."""


class ServeTask(msgspec.Struct, frozen=True, kw_only=True):
    """A checked document."""

    model: InferenceTask
    serve: Serve
    name: str
    """The name of the served model."""


def read_serve(ctx: Context, spec: dict[str, Any], where: str = "spec") -> ServeTask:
    """The checked document.

    Raises:
        BadRequest: names all fields that are wrong.
    """
    faults = Faults()
    options = {"inference": InferenceOptions, "serve": Serve}
    faults.read(lambda: check_spec(ctx, spec, where, OWN_FIELDS, options))
    of_model = {name: spec[name] for name in MODEL_FIELDS if name in spec}
    task = faults.read(lambda: read_task(ctx, of_model, where))
    serve = faults.read(lambda: ctx.check(spec.get("serve") or {}, Serve, f"{where}.serve"))
    if serve is not None:
        faults.read(lambda: address_of(serve, where))
    if ctx.merge_children:
        faults.read(lambda: _refuse("merge_children: a serving task cannot be merged; send each by itself"))
    faults.check()
    assert task is not None, "else it was a fault"
    assert serve is not None, "else it was a fault"
    return ServeTask(model=task, serve=serve, name=serve.served_model_name or _name(task))


def _name(task: InferenceTask) -> str:
    """A name of the model that shows no path of the node."""
    given = task.model.source.identifier or ""
    if task.checkpoint is not None or given.startswith(("/", ".", "~")):
        return given.rstrip("/").rpartition("/")[2][:MAX_NAME].lstrip(".~") or "model"
    return given[:MAX_NAME] or "model"


def check_names(adapters: Sequence[LocalAdapter], name: str) -> None:
    """Raises BadRequest for a runtime adapter that has the served model's name."""
    for adapter in adapters:
        if adapter.name == name:
            raise BadRequest(f"{adapter.where}.name: {name!r} is also the served model's name; choose another")


def address_of(serve: Serve, where: str = "spec") -> str:
    """The address to listen on, as Python writes it.

    Raises:
        BadRequest: it is none.
    """
    try:
        return str(ipaddress.ip_address(serve.host))
    except ValueError:
        raise BadRequest(
            f"{where}.serve.host: expected an IP address such as 127.0.0.1 (found {serve.host[:80]!r})"
        ) from None


def check_allowed(ctx: Context, serve: Serve) -> None:
    """Raises BadRequest where the operator does not allow the address."""
    host, allowed = address_of(serve), ctx.job.permits.serve
    if host not in allowed and "*" not in allowed:
        raise BadRequest(
            f"spec.serve.host: {host} is not allowed on this node; its setting tasks.allow_serve has the addresses "
            "that are"
        )


def _refuse(message: str) -> None:
    raise BadRequest(message)
