"""Tokens/s of an inference task on Transformers against the bare library."""

from __future__ import annotations

from tests.gpu.kit import speed
from tests.gpu.kit.scene import Scene
from tests.gpu.kit.steps.fork_servers import check_servers

AIM = 0.9


def run(scene: Scene) -> None:
    bare = speed.floor(scene, "generate")
    scene.wait_word("IDLE")  # the bare script was a foreign process on the GPU
    plan = speed.plan(scene)
    spec = {
        "taskType": "inference",
        "engine": "transformers",
        "enforce_cpu": scene.dry,
        "model": speed.model_section(scene),
        "data": {"type": "list", "items": plan["prompts"]},
        "inference": {"temperature": 0, "max_tokens": plan["new_tokens"], "ignore_eos": True},
    }
    task = scene.send(spec)
    usage = scene.result(task)["usage"]
    expected = len(plan["prompts"]) * plan["new_tokens"]
    assert usage["completion_tokens"] == expected, f"{usage['completion_tokens']} of {expected} tokens"
    ours = usage["completion_tokens"] / usage["latency_sec"]
    scene.timing(
        f"inference of {len(plan['prompts'])} prompts of {plan['new_tokens']} new tokens",
        ok=ours >= AIM * bare,
        value=f"{ours:.0f} tokens/s, {ours / bare:.2f} × the bare library",
        against=f"{bare:.0f} tokens/s",
        aim=f"at least {AIM:.1f} ×",
    )
    phases = scene.end_of(task)["payload"].get("phases")
    scene.row("its phases", ok=None, value=", ".join(f"{name} {s:.2f} s" for name, s in (phases or {}).items()))
    check_servers(scene, "models")
