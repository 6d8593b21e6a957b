"""What a task logs as a warning is in `warnings` of its result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from runners import child
from runners.api import Context, Runner


class Warns(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.log.info("loading")
        ctx.log.warning("the first of %d\nwith a line break", 2)
        ctx.log.warning("the second")
        ctx.log.warning("the second")
        ctx.log.error("no warning")
        logging.getLogger("another.library").warning("not ours")
        return {"ok": True}


class Quiet(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        return {"ok": True}


def test_each_different_warning_is_in_the_result(make_context: Callable[..., Context]) -> None:
    ctx = make_context({}, runner=f"{__name__}:Warns")
    outcome = child.run(ctx.job, ctx)
    assert outcome.result == {"ok": True, "warnings": ["the first of 2 with a line break", "the second"]}
    assert not [each for each in ctx.log.handlers if "Collector" in type(each).__name__]  # the next task has its own


def test_without_warnings_there_is_no_such_field(make_context: Callable[..., Context]) -> None:
    ctx = make_context({}, runner=f"{__name__}:Quiet")
    assert child.run(ctx.job, ctx).result == {"ok": True}


@pytest.mark.timeout(300)
def test_a_warning_of_rank_0_reaches_the_result_of_a_group(tmp_path: Any) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    from tests.kit.training_tasks import train

    result = train(
        tmp_path,
        "sft",
        {
            "model": {"source": {"identifier": "builtin:tiny-llama"}},
            "data": {"prompts": ["the node waits", "a slot returns" * 40]},
            "training": {"max_steps": 1, "batch_size": 1, "nproc_per_node": 2, "max_seq_length": 16,
                         "save_model": False, "save_strategy": "no"},
        },
    )  # fmt: skip
    assert [each for each in result["warnings"] if "truncated" in each]
