"""vLLM through a node: a tiny task cold and forked, and tokens/s of both engines beside bare vLLM and a bare batch.

Needs vLLM, which `scripts/test` installs into an environment of its own: run from another one, this asks that one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.inference import SPEC
from tests.bench.measure import Row, deployment, ms, percentile, publish_to_end, spread
from tests.kit.support import ROOT

TOKENS = 32
PROMPTS = [" ".join(f"word{(n * 7 + k) % 97}" for k in range(1 + (n * 5) % 24)) for n in range(64)]
ARGUMENTS = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}

TINY: dict[str, Any] = {
    **SPEC,
    "engine": "vllm",
    "enforce_cpu": False,
    "model": {**SPEC["model"], "vllm": {"enforce_eager": True}},
}

_ENGINES = ("vllm", "transformers")
_BARE_KINDS = {"bare vllm": "vllm", "bare batch": "transformers", "continuous": "continuous"}

_BARE = """
import json, os, sys, time
model, kind, *rest = sys.argv[1:]
prompts, tokens, arguments = map(json.loads, rest)
if kind == "vllm":
    from vllm import LLM, SamplingParams
    llm = LLM(model, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=False)
    llm.generate(prompts[:2], sampling, use_tqdm=False)
    began = time.perf_counter()
    made = sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False))
else:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(model, padding_side="left")
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    batch = tok(prompts, return_tensors="pt", padding=True)
    began = time.perf_counter()
    if kind == "continuous":
        from transformers import ContinuousBatchingConfig, GenerationConfig
        greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=tok.eos_token_id,
                                  pad_token_id=tok.pad_token_id)
        blocks = ContinuousBatchingConfig(page_size=16, num_blocks=1024, max_batch_tokens=256)
        ids = [tok(prompt)["input_ids"] for prompt in prompts]
        done = llm.generate_batch(ids, generation_config=greedy, continuous_batching_config=blocks)
        made = sum(len(each.generated_tokens) for each in done.values())
        print(json.dumps(made / (time.perf_counter() - began)), flush=True)
        os._exit(0)
    with torch.inference_mode():
        out = llm.generate(**batch, do_sample=False, max_new_tokens=tokens)
    made = int((out[:, batch["input_ids"].shape[1]:] != tok.pad_token_id).sum())
print(json.dumps(made / (time.perf_counter() - began)), flush=True)
os._exit(0)
"""


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    return in_venv_vllm("tests.bench.vllm", quick=quick, run=_measure)


def in_venv_vllm(module: str, *, quick: bool, run: Callable[..., list[Row]]) -> list[Row]:
    """Rows of a measurement with vLLM: from `run`, or from `module` as a program of the environment that has vLLM."""
    if importlib.util.find_spec("vllm") is not None:
        return run(quick=quick)
    other = ROOT / ".venv-vllm" / "bin" / "python"
    if not other.exists():
        return [Row("vLLM", "not measured: `scripts/test` installs it into .venv-vllm")]
    command = [str(other), "-m", module, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        return [Row("vLLM", f"not measured: {done.stderr.strip().splitlines()[-1:]}")]
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _measure(*, quick: bool) -> list[Row]:
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder, deployment("--log-level", "WARNING") as (node, peer):
        cold = publish_to_end(peer, TINY)
        forked = [publish_to_end(peer, TINY) for _ in range(3 if quick else 10)]
        model, size = _model(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in (*_ENGINES, *_BARE_KINDS)}
        for _ in range(rounds):
            for engine in _ENGINES:
                task = peer.dispatch("w1", _spec(model, engine))
                end = peer.wait_end(task, 300)
                if end["type"] != "TASK_SUCCEEDED":
                    raise RuntimeError(end["error"])
                usage = node.result(task)["usage"]
                rates[engine].append(usage["completion_tokens"] / usage["latency_sec"])
            for name, kind in _BARE_KINDS.items():
                rates[name].append(_bare(model, kind))
    best = {name: max(values) for name, values in rates.items()}
    what = f"{len(PROMPTS)} mixed prompts × {TOKENS} tokens, {size / 1e6:.0f} M parameters, float32, best of {rounds}"
    return [
        Row(
            "tiny vLLM task, forked: publish → TASK_SUCCEEDED (p50 / p95 / p99)",
            spread(forked),
            f"{cold / percentile(forked, 0.5):.0f} times faster than on a cold node ({ms(cold)})",
            "under 2 s",
        ),
        Row(
            f"vLLM: {what}",
            f"{best['vllm']:.0f} tokens/s",
            f"{best['vllm'] / best['bare vllm']:.3f} × bare vLLM ({best['bare vllm']:.0f})",
            "within 5 %",
        ),
        Row(
            f"Transformers: {what}",
            f"{best['transformers']:.0f} tokens/s",
            f"{best['transformers'] / best['bare batch']:.2f} × one padded batch ({best['bare batch']:.0f})",
        ),
        Row(
            "continuous batching of Transformers, which the engine does not use, on the same prompts",
            f"{best['continuous']:.0f} tokens/s",
            f"{best['continuous'] / best['transformers']:.2f} × the engine's sorted batches",
        ),
    ]


def _model(folder: Path) -> tuple[str, int]:
    """A random Llama of about 80 million parameters, with the tiny one's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from runners.models.builtin import write_tiny_llama

    (folder / "tiny").mkdir()
    write_tiny_llama(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    return str(folder / "large"), sum(p.numel() for p in model.parameters())


def _spec(model: str, engine: str) -> dict[str, Any]:
    return {
        "taskType": "inference",
        "engine": engine,
        "enforce_cpu": engine == "transformers",
        "model": {
            "source": {"type": "huggingface", "identifier": model},
            "vllm": ARGUMENTS,
            "transformers": {"dtype": "float32"},
        },
        "data": {"type": "list", "items": PROMPTS},
        "inference": {"temperature": 0, "max_tokens": TOKENS},
    }


def _bare(model: str, kind: str) -> float:
    texts = [model, kind, json.dumps(PROMPTS), str(TOKENS), json.dumps(ARGUMENTS)]
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", _BARE, *texts]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(row) for row in _measure(quick="--quick" in sys.argv)]))
