"""A runner that uses vLLM as it comes: its engine core and its workers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from runners.api import Context, Runner


class GenerateRunner(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        ctx.phase("import")
        with speaking(ctx):
            from vllm import LLM, SamplingParams

        ctx.phase("load")
        with speaking(ctx):
            llm = LLM(ctx.spec["model"], dtype="float32", enforce_eager=True, max_model_len=256)
        ctx.phase("generate")
        (ctx.out_dir / "generating").write_text("now")
        tokens = ctx.spec.get("tokens")
        sampling = SamplingParams(max_tokens=tokens or 200, ignore_eos=True)
        outputs = llm.generate(["one two"] * (1 if tokens else 20_000), sampling, use_tqdm=False)
        return {"ok": True, "count": len(outputs)}


@contextlib.contextmanager
def speaking(ctx: Context) -> Iterator[None]:
    """Says every second that it goes on, so that a test need not wait long to call silence a hang."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(1):
            ctx.progress(0, 1, "loading")

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
