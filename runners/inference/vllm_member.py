"""A member of a task on several nodes that has no engine: it computes for the first member's."""

from __future__ import annotations

import multiprocessing.connection
from typing import Any

from flowmesh.messages.nodes import Gang
from runners.api import Context, RunnerError
from runners.gang import of_member
from runners.inference.members import POLL_S, Over, follow
from runners.inference.task import InferenceTask
from runners.inference.task_model import find_source
from runners.inference.vllm_engine import set_environment
from runners.inference.vllm_nodes import member_arguments, set_addresses
from runners.inference.vllm_prepared import arguments_of


def compute(ctx: Context, task: InferenceTask, gang: Gang) -> dict[str, Any]:
    """Compute for the first member's engine until that one has its answers; returns this member's result.

    Raises:
        BadRequest, RunnerError: the model or an argument does not fit this node.
        Gone: the first member ended without a result.
        Cancelled: the node asked the task to stop.
    """
    ctx.phase("load")
    source = find_source(ctx, task)
    with follow(ctx, gang) as follower:
        start = follower.start(ctx)
        if start is not None:
            arguments, _, _ = arguments_of(ctx, task, source, [], work=start.work)
            arguments |= member_arguments(gang, start)
            # Of the scheduler alone, which is the first member's.
            arguments.pop("structured_outputs_config", None)
            try:
                with follower.until_over(ctx):
                    _run_workers(ctx, {"model": source.path, "revision": source.revision, **arguments}, gang)
            except Over:
                ctx.log.info("the first member has its answers")
    return of_member(gang)


def _run_workers(ctx: Context, arguments: dict[str, Any], gang: Gang) -> None:
    """Start this node's workers, and wait for them."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    set_environment(ctx, alone=False, eager=bool(arguments["enforce_eager"]))
    set_addresses(gang)
    config = EngineArgs(**arguments).create_engine_config(usage_context=UsageContext.LLM_CLASS, headless=True)
    executor = MultiprocExecutor(config, monitor_workers=False)
    ctx.phase("generate")
    sentinels = [worker.proc.sentinel for worker in executor.workers]
    while not multiprocessing.connection.wait(sentinels, timeout=POLL_S):
        ctx.check_cancelled()
    raise RunnerError("a process of vLLM's engine on this node died; see the log")
