"""What of the node's environment a task sees."""

from __future__ import annotations

from flowmesh.processes import environ

NODE = {
    "PATH": "/bin",
    "LC_ALL": "C",
    "REDIS_URL": "redis://:pw@h/0",
    "ORCHESTRATOR_TOKEN": "t",
    "AWS_SECRET_ACCESS_KEY": "s",
    "HF_TOKEN": "hf",
    "NCCL_DEBUG": "INFO",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "MY_FLAG": "1",
}


def test_only_listed_names_pass() -> None:
    assert environ.base(NODE, ()) == {"PATH": "/bin", "LC_ALL": "C", "NCCL_DEBUG": "INFO"}


def test_the_node_may_pass_more_but_never_its_secrets() -> None:
    passed = environ.base(NODE, ("MY_*", "HF_TOKEN", "REDIS_URL", "ORCHESTRATOR_*", "*"))
    assert passed["MY_FLAG"] == "1"
    assert passed["HF_TOKEN"] == "hf"
    assert "REDIS_URL" not in passed
    assert "ORCHESTRATOR_TOKEN" not in passed


def test_a_task_sees_its_devices_and_its_mark() -> None:
    env = environ.for_task(
        {"PATH": "/bin"}, task_env={"X": "1", "TMPDIR": "/evil"}, tmp_dir="/t/1", threads=4, gpus=("GPU-a",), mark="n:1"
    )
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert env["OMP_NUM_THREADS"] == "4"
    assert env["TMPDIR"] == "/t/1"
    assert env["FLOWMESH_ATTEMPT"] == "n:1"
    assert env["X"] == "1"


def test_without_gpus_none_are_visible() -> None:
    env = environ.for_task({}, task_env={}, tmp_dir="/t", threads=1, gpus=(), mark="m")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
