"""FSDP2 for real on two CPU ranks: a spread model trains, is saved whole, and goes on from its checkpoint.

Accelerate shards on GPUs only. All that is bent here is its idea of what the machine has.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from runners.api import Context, Runner
from runners.training import checkpoints, core, groups, ranks
from runners.training.devices import Device, lay_out
from runners.training.inputs import fetch
from runners.training.plan import read
from runners.training.progress import Meter
from runners.training.setup import Setup
from tests.kit.training_tasks import QUICK, SUMS, losses, train

AUTOMATIC = "fsdp2 (auto_deepspeed: deepspeed is not installed)"


class ShardedSft(Runner):
    """As the trainers' runner, on ranks that take the CPU for a GPU."""

    def run(self, ctx: Context) -> dict[str, Any]:
        plan = read(ctx.spec["taskType"], ctx)
        fetched, layout = fetch(plan, ctx), lay_out(plan, ctx)

        def work(place: ranks.Place, own: Context, listener: Any, port: int) -> dict[str, Any]:
            from accelerate.state import PartialState
            from accelerate.utils import DistributedType

            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
            core.quiet()
            ranks.join(place, Device(cuda=False, bf16=False), (listener, port), 60)
            setup = Setup(
                plan=plan,
                ctx=own,
                fetched=fetched,
                layout=layout,
                place=place,
                device=Device(cuda=True, bf16=False, local_rank=place.local_rank),
                meter=Meter(own, ranks.agreement(place)),
                start=checkpoints.start_of(plan, own, None),
            )
            job = core.load(setup)
            job.train()
            job.save()
            return core.result_of(setup, job, 1.0)

        return groups.run(layout, ctx, work)[0].result or {}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is picked where it is")
@pytest.mark.parametrize("task_type", ["sft", "lora_sft"])
def test_a_spread_model_is_saved_whole_and_gone_on_from(tmp_path: Path, task_type: str) -> None:
    training = {**QUICK, "max_steps": 6, "batch_size": 4, "nproc_per_node": 2, "logging_steps": 1, "save_steps": 3}
    spec = {"data": {"prompts": SUMS}, "training": training, **({} if task_type == "sft" else {"lora": {"dropout": 0}})}

    def sharded(task_id: str) -> dict[str, Any]:
        return train(tmp_path, task_type, spec, task_id=task_id, runner=f"{__name__}:ShardedSft")

    plain = train(tmp_path, task_type, spec, task_id="plain")
    whole = sharded("whole")
    assert whole["metrics"]["sharding"] == AUTOMATIC
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-3)
    assert weights(whole) == pytest.approx(weights(plain), abs=0.02)

    there = Path(whole["checkpoints_dir"]) / "checkpoint-3"
    assert checkpoints.torn(there) == ""
    shutil.copytree(there, tmp_path / "results" / "again" / "checkpoints" / there.name)
    again = sharded("again")
    assert again["metrics"]["first_step"] == 3
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)

    (there / "optimizer.bin").write_bytes((there / "optimizer.bin").read_bytes()[:-50])
    assert checkpoints.torn(there) == "optimizer.bin ends early"


def weights(result: dict[str, Any]) -> dict[str, float]:
    """The mean size of each saved weight."""
    from safetensors.torch import load_file

    (path,) = Path(result.get("final_model_path") or result["final_lora_path"]).glob("*.safetensors")
    return {name: float(weight.float().abs().mean()) for name, weight in load_file(path).items()}
