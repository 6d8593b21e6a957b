"""What programs of a task on several nodes find: their place, and a torchrun group over all members."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowmesh.messages.nodes import Gang
from runners.api import Context
from runners.command import start
from runners.command.runner import CommandRunner
from runners.echo import EchoRunner
from tests.kit.paths import PERMITS, ROOT
from tests.kit.support import free_port

ALLOWED = msgspec.structs.replace(PERMITS, commands=("*",))


def gang(rank: int, port: int = 29400) -> Gang:
    return Gang(task_id="whole", rank=rank, size=2, host="127.0.0.1", port=port, rdzv_id="whole.1")


def environment(ctx: Context) -> dict[str, str]:
    CommandRunner().run(ctx)
    return dict(line.split("=", 1) for line in (ctx.out_dir / "work" / "env").read_text().splitlines() if "=" in line)


def test_a_program_finds_its_place_among_the_members(make_context: Any) -> None:
    fields = {"task_type": "command", "permits": ALLOWED}
    names = ("MASTER_", "NODE_RANK", "NNODES", "RANK", "WORLD_", "LOCAL_", "GLOO", "NCCL", "FLOWMESH_RDZV")
    found = environment(make_context({"script": "env > env"}, gang=gang(1), **fields))
    assert {name: value for name, value in found.items() if name.startswith(names)} == {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400",
        "NODE_RANK": "1",
        "NNODES": "2",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "FLOWMESH_RDZV_ID": "whole.1",
    }
    assert "MASTER_ADDR" not in environment(make_context({"script": "env > env"}, task_id="alone", **fields))


def test_echo_says_its_place(make_context: Any) -> None:
    result = EchoRunner().run(make_context({"taskType": "echo"}, task_type="echo", gang=gang(1)))
    assert (result["rank"], result["size"]) == (1, 2)


def test_torchrun_numbers_the_ranks_of_all_members(make_context: Any, tmp_path: Path) -> None:
    """Rank 0 is on the first member, whichever comes first, and each member's ranks are neighbours."""
    pytest.importorskip("torch", reason="needs the extra 'training'")
    write, processes, port = f"echo $WORLD_SIZE $MASTER_PORT > {tmp_path}/$0.$RANK", [], free_port()
    for rank in (1, 0):
        ctx = make_context({}, task_type="command", task_id=f"t{rank}", gang=gang(rank, port))
        argv = start.torchrun(ctx, 2, ["sh", "-c", write, f"node{rank}"], python=False)
        env = {**os.environ, **start.of_group(ctx, 2), **start.of_gang(ctx)}
        processes.append(subprocess.Popen(argv, env=env, cwd=ROOT))
    assert [process.wait(120) for process in processes] == [0, 0]
    said = {path.name: path.read_text() for path in tmp_path.glob("node*")}
    assert said == {f"node{rank // 2}.{rank}": f"4 {port}\n" for rank in range(4)}
