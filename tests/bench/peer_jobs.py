"""The jobs that other systems are given. With Celery, also its application: `celery -A tests.bench.peer_jobs`.

A program: `python -m tests.bench.peer_jobs PATH` is RQ's worker on Redis' socket, with the imports of inference done
before it forks.
"""

from __future__ import annotations

import importlib
import os
import sys

PROMPTS = ["one", "two words", "three more words"]
TOKENS = 8


def nothing() -> int:
    return 1


def infer(model: str) -> int:
    """Load a model and complete PROMPTS in one batch, greedily; returns how many texts there are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        out = loaded.generate(**batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return len(tokenizer.batch_decode(out))


def preload() -> None:
    """Import what a node's fork server imports for the same task, but for the node's own modules."""
    from runners.inference.preload import TRANSFORMERS

    for name in TRANSFORMERS:
        if not name.startswith("runners."):
            importlib.import_module(name)


if "BENCH_PRELOAD" in os.environ:
    preload()
if "BENCH_BROKER" in os.environ:
    from celery import Celery

    app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BROKER"])
    app.conf.worker_prefetch_multiplier = 1
    app.task(nothing, name="nothing")
    app.task(infer, name="infer")

if __name__ == "__main__":
    import redis
    import rq

    preload()
    rq.Worker(["default"], connection=redis.Redis(unix_socket_path=sys.argv[1])).work(logging_level="ERROR")
