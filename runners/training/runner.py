"""The training runners, one a task type. Importing this imports no library of theirs."""

from __future__ import annotations

from typing import Any, ClassVar

from runners.api import Context, Preparation, Runner


class TrainingRunner(Runner):
    """Base class; subclasses name their row in `kinds`."""

    task_type: ClassVar[str]

    def ahead(self, ctx: Context) -> list[Preparation]:
        from runners.training.inputs import parts_ahead

        return parts_ahead(self.task_type, ctx)

    def run(self, ctx: Context) -> dict[str, Any]:
        from runners.training.core import run

        return run(self.task_type, ctx)


class SftRunner(TrainingRunner):
    task_type = "sft"


class LoraSftRunner(TrainingRunner):
    task_type = "lora_sft"


class DpoRunner(TrainingRunner):
    task_type = "dpo"


class PpoRunner(TrainingRunner):
    task_type = "ppo"


class GrpoRunner(TrainingRunner):
    task_type = "grpo"


class RlooRunner(TrainingRunner):
    task_type = "rloo"


class KtoRunner(TrainingRunner):
    task_type = "kto"


class RewardRunner(TrainingRunner):
    task_type = "reward"
