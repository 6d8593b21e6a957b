"""Checkpoints by time, and what a resumed run says about the steps that were lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from flowmesh.messages import steps
from flowmesh.messages.steps import Steps
from flowmesh.processes.pipe import Cancel, Pipe, Progress
from runners.training.progress import Meter
from runners.training.step_notes import StepNotes
from tests.kit.training_tasks import QUICK, SUMS, start, train

ALLOWED = {"reward_callables": ["tests.kit.training_tasks:*"]}
NO_STEPS = {**QUICK, "save_strategy": "no", "logging_steps": 1}
SPECS: dict[str, dict[str, Any]] = {
    "sft": {"data": {"prompts": SUMS}, "training": NO_STEPS},
    "ppo": {
        "data": {"prompts": ["a task", "the node", "a slot"]},
        "reward": {"function": "tests.kit.training_tasks:likes_e"},
        "generation": {"max_new_tokens": 4},
        "training": {**NO_STEPS, "max_seq_length": 32},
    },
}


def noted(out_dir: Path) -> Steps | None:
    with (out_dir / "checkpoints" / "steps.json").open("rb") as file:
        return steps.read(file)


@pytest.mark.parametrize("task_type", SPECS)
def test_checkpoints_come_by_time(tmp_path: Path, task_type: str) -> None:
    spec = SPECS[task_type]
    spec = spec | {"training": spec["training"] | {"save_on_time_s": 1e-6, "max_steps": 3}}
    result = train(tmp_path, task_type, spec, limits=ALLOWED)
    folder = Path(result["checkpoints_dir"])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert noted(folder.parent) == Steps(done=3, total=3, checkpointed=3)
    assert "lost_steps" not in result, "there was no earlier attempt"


def test_a_killed_run_says_what_was_lost(tmp_path: Path) -> None:
    spec = SPECS["sft"] | {"training": {**NO_STEPS, "max_steps": 400}}
    running = start(tmp_path, "sft", spec)
    running.wait_for(lambda frame: isinstance(frame, Progress) and frame.done >= 2)
    running.kill(signal.SIGKILL)
    assert running.ended(60)
    killed = noted(running.out_dir)
    assert killed is not None
    assert killed.done >= 2
    assert killed.checkpointed == 0
    again = train(tmp_path, "sft", spec | {"training": {**spec["training"], "max_steps": 2}})
    assert again["lost_steps"] == killed.done
    assert noted(running.out_dir) == Steps(done=2, total=2, checkpointed=0, lost=killed.done)


def test_losses_add_up_over_attempts(tmp_path: Path) -> None:
    first = StepNotes(tmp_path)
    first.begin(0, 20)
    for step in range(1, 8):
        first.advance(step)
        if step == 4:
            first.saved(step)
    assert first.lost is None
    second = StepNotes(tmp_path)
    second.begin(4, 20)
    second.advance(5)
    assert second.lost == 3
    third = StepNotes(tmp_path)
    third.begin(4, 20)
    assert third.lost == 4
    (tmp_path / "steps.json").write_bytes(b"{torn")
    fourth = StepNotes(tmp_path)
    fourth.begin(4, 20)
    assert fourth.lost is None


def test_all_ranks_save_when_one_is_due(make_context, tmp_path: Path) -> None:
    """A cancel wins over it; and a save by steps counts as well."""
    near, far = Pipe.pair()
    others = 1
    meter = Meter(
        make_context({}, pipe=far), lambda own: max(own, others), saves_every_s=3600, notes=StepNotes(tmp_path)
    )
    meter.begin(0, 10)
    assert meter.must_stop() is None
    assert meter.save_due, "another rank's clock says so"
    meter.saved(1)
    others = 0
    assert meter.must_stop() is None
    assert not meter.save_due
    near.send(Cancel("enough", checkpoint=True))
    stopped = meter.must_stop()
    assert stopped is not None
    assert stopped.checkpoint
    for pipe in (near, far):
        pipe.close()
