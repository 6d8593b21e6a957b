"""Task documents that the inference tests have in common."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["a task", "starts", "the node", "ends", "a slot", "returns", "the model", "waits for", "its memory", "and"]


def mixed_prompts(count: int, longest: int = 60, seed: int = 3) -> list[str]:
    """Prompts of one to `longest` phrases."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def spec_of(model: Path | str, items: list[Any], engine: str = "transformers", **inference: Any) -> dict[str, Any]:
    """A greedy float32 task on the CPU."""
    return {
        "model": {
            "source": {"identifier": str(model)},
            "transformers": {"dtype": "float32"},
        },
        "data": {"type": "list", "items": items},
        "inference": {"temperature": 0, "max_tokens": 16, **inference},
        "engine": engine,
    }


def change(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `spec` with another value at a dotted path."""
    copy = json.loads(json.dumps(spec))
    *parents, last = path.split(".")
    at = copy
    for name in parents:
        at = at.setdefault(name, {})
    at[last] = value
    return copy


def outputs(result: dict[str, Any]) -> list[str]:
    return [item["output"] for item in result["items"]]
