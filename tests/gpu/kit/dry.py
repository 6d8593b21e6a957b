"""A dry run's machine: a stub of NVIDIA's library with two cards, and an nvidia-smi that answers queries.

The stub is the one of the tests. What would change a device is added to a file, by both, and the last step reads it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.nvml_stub.harness import library

TOTAL = 81559 << 20
CARD = "NVIDIA H100 80GB HBM3"
UUIDS = ("GPU-00000000-0000-0000-0000-00000000000a", "GPU-00000000-0000-0000-0000-00000000000b")
USED = 500 << 20
DRIVER = "580.159.04"
MORE = "FLOWMESH_GPU_CHECK_STUB"
"""More lines for the stub's script: for the tests of the kit itself."""


def prepare(folder: Path) -> dict[str, str]:
    """Write both, and return the environment in which they are found."""
    built = library()
    home = folder / "stub"
    home.mkdir()
    (home / built.name).write_bytes(built.read_bytes())
    script = home / "script"
    # Of several lines with one key the first counts.
    lines = [*os.environ.get(MORE, "").splitlines(), f"driver {DRIVER}", "cuda 13000"]
    for uuid in UUIDS:
        lines += [f"gpu {uuid} {TOTAL} {CARD}", f"set {uuid} used {USED}", f"set {uuid} power 400000"]
        lines += [f"set {uuid} util 97", f"set {uuid} temp 40", f"set {uuid} metered 100"]
    script.write_text("\n".join(lines) + "\n")
    table = "\\n".join(f"{at}, {CARD}, {uuid}, {TOTAL >> 20}, {DRIVER}" for at, uuid in enumerate(UUIDS))
    smi = home / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'"--query-gpu=index,name,"*) printf "{table}\\n" ;;\n'
        '"--query-"*) echo "a stub has no readings" ;;\n'
        f'"") echo "| Driver Version: {DRIVER}   CUDA Version: 13.0 |" ;;\n'
        f'*) echo "nvidia-smi $*" >>"{script}.changes"; exit 9 ;;\n'
        "esac\n"
    )
    smi.chmod(0o755)
    return {
        "FLOWMESH_NVML_STUB": str(script),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(home), os.environ.get("LD_LIBRARY_PATH")])),
        "PATH": os.pathsep.join([str(home), os.environ["PATH"]]),
    }
