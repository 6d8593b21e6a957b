"""Slots at once, each task with what its CUDA_VISIBLE_DEVICES leaves it: one GPU, or none."""

from __future__ import annotations

from tests.gpu.kit.scene import NO_GPU, Scene, worker_of


def run(scene: Scene) -> None:
    expected = {worker_of(gpu): gpu.uuid for gpu in scene.gpus} | {NO_GPU: ""}
    tasks = {worker: scene.dispatch("burn", worker=worker, seconds=1.0) for worker in expected}
    results = {worker: scene.result(task) for worker, task in tasks.items()}
    seen = {worker: result["visible"] for worker, result in results.items()}
    entered_at = [result["entered_at"] for result in results.values()]
    at_once = max(entered_at) < min(result["left_at"] for result in results.values())
    kernels = {worker: scene.dispatch("kernel", worker=worker) for worker in expected}
    devices = {worker: scene.result(task)["devices"] for worker, task in kernels.items()}
    counts = {worker: int(bool(uuid)) for worker, uuid in expected.items()}
    scene.row(
        f"{len(expected)} slots at once: each task sees its own GPU and no other",
        ok=seen == expected and at_once and (scene.dry or devices == counts),
        value=", ".join(f"{worker}: {uuid or 'none'}" for worker, uuid in seen.items()),
        why=f"expected {expected}, seen {seen}, devices of CUDA {devices}, at once: {at_once}",
    )
    if len(scene.gpus) == 1:
        scene.skip("slots of two GPUs", "this machine has one GPU: a slot with it and one without were run")
