"""Modules that an environment's fork server imports, so that a training task forked from it begins at once.

Importing them starts no native thread; see `runners.inference.preload`.
"""

TRAINING: tuple[str, ...] = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "accelerate",
    "datasets",
    "peft",
    "transformers",
    "transformers.trainer",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.safetensors_conversion",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.kto_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.rloo_trainer",
    "runners.inference.warm",
    "runners.training.runner",
    "runners.training.core",
    "runners.training.trl_job",
    "runners.training.ppo",
    "runners.training.reward_model",
)
"""Importing them takes 5 s. A tiny task then takes 0.5 s in its child, and a group of two ranks 1 s."""
