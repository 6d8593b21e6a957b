"""Tiny models for tests, made on the spot. As a script, `python -m tests.kit.tiny_models DIR` writes one into DIR."""

from __future__ import annotations

import sys
from pathlib import Path

from runners.models.builtin import write_tiny_llama


def write_tiny_lora(model_dir: Path, folder: Path, *, seed: int = 1, rank: int = 4, alpha: int = 16) -> None:
    """Write a LoRA adapter for the model in `model_dir` with random, clearly visible weights into `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.2)
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.kit.tiny_models DIR")
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_tiny_llama(target)
    print(target)
