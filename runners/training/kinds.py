"""The table of trainers: all that differs between task types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runners.training import settings, sources


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One task type."""

    task_type: str
    trainer: str
    """TRL's class; empty for our own PPO."""
    training: type[settings.Training]
    data: type[sources.Data]
    learning_rate: float
    lora_learning_rate: float
    batch_size: int = 4
    save_steps: int = 100
    gradient_checkpointing: bool = False
    lora: Literal["never", "always", "optional"] = "optional"
    head: Literal["causal", "score"] = "causal"
    reference: bool = False
    """Needs the initial model as a reference."""
    rewarded: bool = False
    """Generates completions and learns from their rewards."""

    @property
    def config(self) -> str:
        return self.trainer.replace("Trainer", "Config")

    def folder(self, *, lora: bool) -> str:
        """Top-level folder of the result."""
        return "final_lora" if lora else "final_model"


KINDS = {
    kind.task_type: kind
    for kind in (
        Kind(
            task_type="sft",
            trainer="SFTTrainer",
            training=settings.SftTraining,
            data=sources.TextData,
            learning_rate=5e-5,
            lora_learning_rate=2e-4,
            batch_size=2,
            gradient_checkpointing=True,
            lora="never",
        ),
        Kind(
            task_type="lora_sft",
            trainer="SFTTrainer",
            training=settings.SftTraining,
            data=sources.TextData,
            learning_rate=2e-4,
            lora_learning_rate=2e-4,
            batch_size=2,
            lora="always",
        ),
        Kind(
            task_type="dpo",
            trainer="DPOTrainer",
            training=settings.PreferenceTraining,
            data=sources.PreferenceData,
            learning_rate=5e-7,
            lora_learning_rate=5e-7,
            save_steps=500,
            reference=True,
        ),
        Kind(
            task_type="kto",
            trainer="KTOTrainer",
            training=settings.PreferenceTraining,
            data=sources.ExampleData,
            learning_rate=1e-6,
            lora_learning_rate=1e-6,
            reference=True,
        ),
        Kind(
            task_type="reward",
            trainer="RewardTrainer",
            training=settings.RewardTraining,
            data=sources.PreferenceData,
            learning_rate=1e-4,
            lora_learning_rate=1e-4,
            head="score",
        ),
        Kind(
            task_type="grpo",
            trainer="GRPOTrainer",
            training=settings.OnlineTraining,
            data=sources.PromptData,
            learning_rate=1e-6,
            lora_learning_rate=1e-5,
            batch_size=8,
            reference=True,
            rewarded=True,
        ),
        Kind(
            task_type="rloo",
            trainer="RLOOTrainer",
            training=settings.OnlineTraining,
            data=sources.PromptData,
            learning_rate=1e-6,
            lora_learning_rate=1e-5,
            batch_size=8,
            reference=True,
            rewarded=True,
        ),
        Kind(
            task_type="ppo",
            trainer="",
            training=settings.PpoTraining,
            data=sources.PromptData,
            learning_rate=1.41e-5,
            lora_learning_rate=1.41e-5,
            batch_size=8,
            reference=True,
            rewarded=True,
        ),
    )
}
