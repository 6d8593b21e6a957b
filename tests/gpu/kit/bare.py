"""The floors, in an interpreter of its own: Transformers' generate and TRL's trainer, as a plain script has them.

Usage: python -m tests.gpu.kit.bare PLAN.json OUT.json. Each measurement is in OUT as soon as it is known.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    found: dict[str, Any] = {}
    for name, measure in (("model", write), ("generate", generate), ("sft", sft), ("lora_sft", lora_sft)):
        if name in plan["measures"]:
            try:
                found[name] = measure(plan)
            except Exception:  # noqa: BLE001 - the others may still work
                found[name] = {"error": traceback.format_exc()[-2000:]}
            out.write_text(json.dumps(found))
            _free()


def write(plan: dict[str, Any]) -> dict[str, Any]:
    from tests.gpu.kit import models

    return {"parameters": models.write(Path(plan["model"]), tiny=plan["device"] == "cpu")}


def generate(plan: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s from prompts to texts, in one batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(plan["threads"])
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"]))
    model = model.to(plan["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(plan["model"], padding_side="left")
    began = time.monotonic()
    batch = tokenizer(plan["prompts"], return_tensors="pt", padding=True)
    batch = {name: batch[name].to(plan["device"]) for name in ("input_ids", "attention_mask")}
    count = plan["new_tokens"]
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=False, min_new_tokens=count, max_new_tokens=count)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
    seconds = time.monotonic() - began
    return {"per_s": len(texts) * count / seconds, "seconds": seconds}


def sft(plan: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Steps/s of `train()`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(plan["threads"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"])),
        args=SFTConfig(output_dir=f"{plan['model']}-bare", **plan["arguments"]),
        train_dataset=Dataset.from_dict({"text": plan["rows"]}),
        processing_class=AutoTokenizer.from_pretrained(plan["model"]),
        **more,
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    return {"per_s": trainer.state.global_step / seconds, "seconds": seconds}


def lora_sft(plan: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    lora = plan["lora"]
    config = LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"], task_type="CAUSAL_LM"
    )
    return sft(plan, peft_config=config)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
