"""`flowmesh exec --preload` of a script with heavy imports, in turn with the script by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import Row, ms, timed
from tests.kit.paths import ROOT
from tests.kit.support import Node, RedisServer, running

MODULES = "torch,transformers"
SCRIPT = f"import {MODULES}\nprint(torch.ones(2).sum().item())\n"


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    name = f"`flowmesh exec --preload {MODULES}` of a script that imports them"
    if importlib.util.find_spec("transformers") is None:
        return [Row(name, "not measured: transformers is not installed")]
    with contextlib.closing(RedisServer()) as server, tempfile.TemporaryDirectory() as folder:
        node = Node(server, "--set=tasks.allow_command=*")
        settings, script = Path(folder, "node.toml"), Path(folder, "script.py")
        settings.write_text(f'[node]\nstate_dir = "{node.state_dir}"\n')
        script.write_text(SCRIPT)
        plain = [sys.executable, str(script)]
        options = ["--config", str(settings), "-q", "--preload", MODULES, "--"]
        under = [sys.executable, "-m", "flowmesh.cli.main", "exec", *options, *plain]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}

        def run(command: list[str]) -> float:
            return timed(lambda: subprocess.run(command, check=True, capture_output=True, env=env, cwd=folder))

        with running(node):
            run(under)  # the first one waits for the fork server's imports
            pairs = [(run(plain), run(under)) for _ in range(3 if quick else 9)]
    ratio = statistics.median(mine / bare for bare, mine in pairs)
    bare, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [Row(name, ms(mine), f"{ratio:.2f} × plain ({ms(bare)})", "at most 0.15", ratio)]
