"""What members of a training on several nodes agree on before they train: where they meet, and one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.nodes import Gang
from runners.api import BadRequest, Context, RunnerError
from runners.training import checkpoints, nodes
from runners.training.plan import Plan, read
from runners.training.progress import alone
from runners.training.ranks import Place

SPEC = {"model": {"source": {"identifier": "builtin:tiny-llama"}}, "data": {"prompts": ["a"]}, "nodes": 2}
LEADS, OTHER = Place(rank=0, world=2), Place(rank=1, world=2)


def member(make_context: Any, rank: int, **training: Any) -> Context:
    gang = Gang(task_id="whole", rank=rank, size=2, host="fd00::1", port=29400, rdzv_id="whole.3")
    task_id = "whole" if rank == 0 else "whole.m1"
    spec = {**SPEC, "training": training}
    return make_context(spec, task_type="sft", task_id=task_id, gang=gang)  # type: ignore[no-any-return]


def planned(ctx: Context) -> Plan:
    return read("sft", ctx)


def test_the_node_says_where_members_meet(make_context: Any) -> None:
    found = planned(member(make_context, 1)).training
    assert (found.nnodes, found.node_rank, found.rdzv_endpoint, found.rdzv_id) == (2, 1, "[fd00::1]:29400", "whole.3")
    with pytest.raises(BadRequest, match=r"spec\.training\.nnodes: spec\.nodes sets it.*spec\.training\.rdzv_id: "):
        planned(member(make_context, 0, nnodes=2, rdzv_id="mine"))


def test_members_write_into_the_tasks_folder_if_all_see_it(make_context: Any) -> None:
    first, other = member(make_context, 0), member(make_context, 1)
    own = other.out_dir
    assert nodes.task_folder(other) == first.out_dir
    seen: list[int] = []

    def agree(value: int) -> int:
        if not seen:
            (first.out_dir / nodes.MARK).write_text("whole.3")  # the first member's, meanwhile
        seen.append(value)
        return value

    assert nodes.share_folder(other, OTHER, agree)
    assert (other.out_dir, seen) == (first.out_dir, [0, 0])
    (first.out_dir / nodes.MARK).write_text("whole.2")  # of an attempt before
    other.out_dir = own
    assert not nodes.share_folder(other, OTHER, alone)
    assert other.out_dir == own
    assert nodes.share_folder(first, LEADS, alone)
    assert not (first.out_dir / nodes.MARK).exists()
    with pytest.raises(RunnerError, match=r"spec\.nodes: deepspeed zero-2 writes a part of each checkpoint"):
        nodes.check_shared("deepspeed zero-2", shared=False)
    nodes.check_shared("ddp", shared=False)


def test_zeros_parts_need_as_many_ranks(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint-4"
    (saved / "global_step4").mkdir(parents=True)
    for rank in range(2):
        (saved / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    checkpoints.check_world(saved, 2)
    with pytest.raises(RunnerError, match="checkpoint-4 was written by 2 ranks, and this run has 1"):
        checkpoints.check_world(saved, 1)
    checkpoints.check_world(tmp_path, 1)
