"""Slots at once, each task with what CUDA_VISIBLE_DEVICES leaves it: a slot for each of two GPUs, and one without."""

from __future__ import annotations

from tests.gpu.kit.scene import Scene, without_heavy_types


def run(scene: Scene) -> None:
    scene.drop_node()  # its slot has the GPU
    gpus = scene.gpus[:2]
    expected = {f"w1-g{gpu.index}": gpu.uuid for gpu in gpus} | {"w1-cpu": ""}
    slots = [(f"g{gpu.index}", f'"{gpu.uuid}"') for gpu in gpus] + [("cpu", "")]
    config = "".join(f'[[slots]]\nname = "{name}"\ngpus = [{listed}]\n' for name, listed in slots)
    node = scene.start_node(config + without_heavy_types(), worker="w1-cpu")
    for worker in expected:
        scene.wait_word("IDLE", node, worker)
    burning = {worker: scene.dispatch("burn", worker=worker, seconds=1.0) for worker in expected}
    results = {worker: scene.result(task, node) for worker, task in burning.items()}
    seen = {worker: result["visible"] for worker, result in results.items()}
    entered_at = [result["entered_at"] for result in results.values()]
    at_once = max(entered_at) < min(result["left_at"] for result in results.values())
    kernels = {worker: scene.dispatch("kernel", worker=worker) for worker in expected}
    devices = {worker: scene.result(task, node)["devices"] for worker, task in kernels.items()}
    scene.drop_node(node)
    counts = {name: int(bool(uuid)) for name, uuid in expected.items()}
    right = seen == expected and at_once and (scene.dry or devices == counts)
    scene.row(
        f"slots at once ({', '.join(expected)}): each task sees its own GPU and no other",
        ok=right,
        value=", ".join(f"{worker}: {uuid or 'none'}" for worker, uuid in seen.items()),
        why=f"expected {expected}, seen {seen}, devices of CUDA {devices}, at once: {at_once}",
    )
    if len(gpus) == 1:
        scene.skip("a slot for each of two GPUs", "this machine has one GPU: a slot with it and one without were run")
