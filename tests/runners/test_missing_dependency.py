"""A library that is missing: a kind of failure of its own, which another worker may not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh.installed import install_command
from flowmesh.messages.job import Exit, Fault, Job, Outcome
from flowmesh.tasks.verdicts import Kind, judge
from runners.api import Context, MissingDependency, Runner
from runners.child import run


class Imports(Runner):
    """Imports `spec.name`, or raises the ImportError that a library would."""

    def run(self, ctx: Context) -> dict[str, Any]:
        if "says" in ctx.spec:
            raise MissingDependency.of(ImportError(ctx.spec["says"]), "spec.model")
        __import__(ctx.spec["name"])
        raise MissingDependency(ctx.spec["needs"])


def outcome(tmp_path: Path, extra: str = "inference", **spec: Any) -> Outcome:
    job = Job(
        attempt=1,
        task_id="t",
        task_type="inference",
        runner=f"{__name__}:Imports",
        extra=extra,
        task={"spec": spec},
        out_dir=str(tmp_path),
        results_dir=str(tmp_path),
        cache_dir=str(tmp_path),
        tmp_dir=str(tmp_path),
    )
    return run(job, Context(job))


@pytest.mark.parametrize("extra", ["inference", "training", "vllm", "rag"])
def test_what_several_extras_install_is_named_by_the_tasks_own(tmp_path: Path, extra: str) -> None:
    found = outcome(tmp_path, extra, name="json", needs="datasets")
    assert found.fault is Fault.MISSING_DEPENDENCY
    assert found.message == (f"datasets is not installed in this environment: {install_command(extra)}")
    assert found.detail == ""


@pytest.mark.parametrize(
    ("library", "remedy"),
    [("bitsandbytes", "[quantization]'"), ("einops", "einops"), ("qdrant_client", "[rag]'")],
)
def test_the_extra_is_that_of_the_library(tmp_path: Path, library: str, remedy: str) -> None:
    assert outcome(tmp_path, name="json", needs=library).message.endswith(remedy)


def test_an_import_that_fails_anywhere_is_of_this_kind(tmp_path: Path) -> None:
    found = outcome(tmp_path, name="no_such_library.part")
    assert found.fault is Fault.MISSING_DEPENDENCY
    assert found.message.startswith("no_such_library is not installed")
    assert "Traceback" in found.detail
    verdict = judge(Exit(code=1), found, None)
    assert verdict.kind is Kind.MISSING_DEPENDENCY
    assert verdict.retryable
    assert outcome(tmp_path, says="this needs `pip install apples`").fault is Fault.MISSING_DEPENDENCY


def test_a_missing_part_of_a_package_that_is_there_is_an_error(tmp_path: Path) -> None:
    assert outcome(tmp_path, name="json.no_such_part").fault is Fault.ERROR
