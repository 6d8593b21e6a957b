"""The hardware that the node registers is what nvidia-smi shows."""

from __future__ import annotations

import json

from tests.gpu.kit import smi
from tests.gpu.kit.scene import MIB, Scene, without_heavy_types


def run(scene: Scene) -> None:
    names = ", ".join(gpu.name for gpu in scene.gpus)
    scene.row("NVML finds the GPUs", ok=True, value=names)
    node = scene.start_node(without_heavy_types(), worker="w1")  # with all of them, in one slot
    told = json.loads(scene.server.client().hget("worker:w1", "hardware_json"))["gpu"]
    scene.drop_node(node)
    try:
        uuids = {gpu.uuid for gpu in scene.gpus}
        seen, cuda = [gpu for gpu in smi.gpus() if gpu["uuid"] in uuids], smi.cuda_version()
    except smi.NoSmi as error:
        scene.skip("registered hardware against nvidia-smi", str(error))
        return
    ours = [
        {
            "index": str(gpu["index"]),
            "name": gpu["name"],
            "uuid": gpu["uuid"],
            "memory.total": str(gpu["memory_total_bytes"] // MIB),
            "driver_version": told["driver_version"],
        }
        for gpu in told["gpus"]
    ]
    scene.row(
        "index, name, UUID, memory and driver as nvidia-smi shows them",
        ok=ours == seen,
        value=f"{len(ours)} GPUs",
        why="" if ours == seen else "they differ",
        evidence={"registered": json.dumps(ours, indent=1), "nvidia-smi's": json.dumps(seen, indent=1)},
    )
    if cuda is None:
        scene.skip("CUDA version as nvidia-smi shows it", "nvidia-smi shows none")
    else:
        same = told["cuda_version"] == cuda
        scene.row("CUDA version as nvidia-smi shows it", ok=same, value=str(told["cuda_version"]), against=cuda)
