"""Dagster assets and jobs of the tests, run in processes of their own beside copies of conf/flows."""

import json
import sys
from pathlib import Path
from typing import Any

import dagster as dg
from flowmesh_dagster import run_task


def python(code: str, **inputs: Any) -> dict[str, Any]:
    return {"spec": {"taskType": "python", "code": code, "inputs": inputs}}


LONG = {"spec": {"taskType": "echo", "delaySec": 600}}
DIES_ONCE = """
import os, pathlib
path = pathlib.Path(inputs["path"])
first = not path.exists()
path.open("a").write("x")
if first:
    os.kill(os.getpid(), 9)
result = 8
"""
FAILS = "open(inputs['path'], 'a').write('x')\nraise ValueError('not today')"
RETRY = dg.RetryPolicy(max_retries=2)


@dg.asset
def short(context: dg.AssetExecutionContext) -> dg.Output[dict]:
    return run_task(context, python("print('a line')\nresult = 6"), dict)


@dg.asset(retry_policy=RETRY)
def again(context: dg.AssetExecutionContext) -> dg.Output[dict]:
    return run_task(context, python(DIES_ONCE, path=str(Path("dies").resolve())), dict, retries=0)


@dg.asset(retry_policy=RETRY)
def failed(context: dg.AssetExecutionContext) -> dg.Output[dict]:
    return run_task(context, python(FAILS, path=str(Path("fails").resolve())), dict, retries=0)


@dg.op
def long_op(context: dg.OpExecutionContext) -> dg.Output[dict]:
    return run_task(context, LONG, dict)


@dg.job(executor_def=dg.in_process_executor)
def long_job() -> None:
    long_op()


def several() -> None:
    with dg.DagsterInstance.get() as instance:
        done = dg.materialize([short, again, failed], instance=instance, raise_on_error=False)
        lines = [entry.user_message for entry in instance.all_logs(done.run_id)]
        failure = next(event for event in done.all_events if event.is_step_failure).step_failure_data
        found = {
            "short": done.output_for_node("short")["result"],
            "worker": done.asset_materializations_for_node("short")[0].metadata["worker"].value,
            "logged": "a line" in lines,
            "again": done.output_for_node("again")["result"],
            "failed": failure.user_failure_data.metadata["verdict"].value,
        }
        print(json.dumps(found))


def go_on() -> None:
    """Runs the job; where a run of it was killed, from there."""
    with dg.DagsterInstance.get() as instance:
        earlier = instance.get_runs(dg.RunsFilter(job_name="long_job"))
        options, tags = None, {}
        if earlier:
            instance.report_run_failed(earlier[0])  # as Dagster's run monitoring does
            options = dg.ReexecutionOptions.from_failure(earlier[0].run_id, instance)
            tags = {"dagster/is_resume_retry": "true"}  # as the UI and run retries set it
        dg.execute_job(dg.reconstructable(long_job), instance=instance, reexecution_options=options, tags=tags)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
