"""How a node is cut into slots, and which cuts are refused by the name of the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.errors import ConfigError
from flowmesh.node.devices import GpuInfo, MigSlice
from flowmesh.node.slots import Slot, SlotFault, SlotPlan, cpu_list, plan
from flowmesh.settings.checks import cpu_numbers
from flowmesh.settings.load import describe, load
from flowmesh.settings.schema import Settings

GPUS = tuple(GpuInfo(index=i, uuid=f"GPU-{c * 8}", name="X", memory_total_bytes=1) for i, c in enumerate("abcd"))
CPUS = tuple(range(16))


def settings(folder: Path, text: str) -> Settings:
    path = folder / "node.toml"
    path.write_text(text)
    return load(path, {}).settings


SLICES = tuple(
    GpuInfo(index=0, uuid=f"MIG-{i}", name="X", memory_total_bytes=1, mig=MigSlice("GPU-a", i, 0)) for i in (1, 2)
)


def cut(
    folder: Path, text: str, gpus: tuple[GpuInfo, ...] = GPUS, cores: int = 16, some_are_down: bool = False
) -> tuple[SlotPlan, ...]:
    return plan(settings(folder, text), "node", gpus, CPUS, cores, some_are_down=some_are_down)


def test_one_slot_has_everything_and_the_nodes_own_id(tmp_path: Path) -> None:
    (slot,) = cut(tmp_path, "")
    assert (slot.worker_id, slot.gpus, slot.cpus, slot.threads, slot.share) == (
        "node",
        tuple(gpu.uuid for gpu in GPUS),
        CPUS,
        16,
        1.0,
    )


def test_a_cgroups_quota_bounds_the_threads(tmp_path: Path) -> None:
    (slot,) = cut(tmp_path, "", cores=3)
    assert (len(slot.cpus), slot.threads) == (16, 3)


def test_per_gpu(tmp_path: Path) -> None:
    slots = cut(tmp_path, "[node]\nslots = 'per-gpu'")
    assert [slot.worker_id for slot in slots] == ["node-gpu0", "node-gpu1", "node-gpu2", "node-gpu3"]
    assert [slot.gpus for slot in slots] == [(gpu.uuid,) for gpu in GPUS]
    assert {(slot.cpus, slot.threads, slot.share) for slot in slots} == {(CPUS, 4, 0.25)}


@pytest.mark.parametrize("gpus", [(), GPUS[:1]])
def test_per_gpu_with_one_gpu_or_none_is_one_slot(tmp_path: Path, gpus: tuple[GpuInfo, ...]) -> None:
    (slot,) = cut(tmp_path, "[node]\nslots = 'per-gpu'", gpus)
    assert (slot.worker_id, slot.gpus, slot.threads) == ("node", tuple(gpu.uuid for gpu in gpus), 16)


def test_slices_of_one_board_have_names_of_their_own(tmp_path: Path) -> None:
    names = [slot.name for slot in cut(tmp_path, "[node]\nslots = 'per-gpu'", SLICES)]
    assert names == ["gpu0-1-0", "gpu0-2-0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"node.slots: its only slot has 2 GPUs, some of them MIG slices.*set it to 'per-gpu'"),
        ("[[slots]]\nname = 'a'\ngpus = ['MIG-1', 'MIG-2']", r"slots: 'a' has 2 GPUs.*its own slot"),
    ],
)
def test_two_slices_in_one_slot_are_refused_for_cuda_would_show_one(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cut(tmp_path, text, SLICES)
    (slot,) = cut(tmp_path, "", SLICES[:1])
    assert slot.gpus == ("MIG-1",)


def test_a_gpu_that_is_down_leaves_the_other_slots_and_their_names(tmp_path: Path) -> None:
    text = "[[slots]]\nname = 'a'\ngpus = [0, 7]\n[[slots]]\nname = 'b'\ngpus = [8]\n"
    first, second = cut(tmp_path, text, some_are_down=True)
    assert (first.worker_id, first.gpus, first.missing) == ("node-a", (GPUS[0].uuid,), ("7",))
    assert (second.worker_id, second.gpus, second.missing) == ("node-b", (), ("8",))
    assert (first.share, second.share) == (pytest.approx(2 / 3), pytest.approx(1 / 3)), "of what the settings name"
    with pytest.raises(ConfigError, match=r"slots\[0\].gpus\[1\]: '7' matches no GPU"):
        cut(tmp_path, text)
    gone = "GPU-12345678-1234-1234-1234-123456789abc"
    (only,) = cut(tmp_path, f"[[slots]]\nname = 'a'\ngpus = ['{gone}']\n")
    assert only.missing == (gone,), "a whole UUID is no slip of the pen"


def test_a_list_of_slots(tmp_path: Path) -> None:
    text = """
        [[slots]]
        name = "train"
        gpus = [0, "GPU-bbbb"]
        cpus = "0-7"
        [[slots]]
        name = "serve"
        gpus = [3]
        [[slots]]
        name = "light"
    """
    train, serve, light = cut(tmp_path, text)
    assert [slot.worker_id for slot in (train, serve, light)] == ["node-train", "node-serve", "node-light"]
    assert train.gpus == (GPUS[0].uuid, GPUS[1].uuid)
    assert (train.cpus, train.threads) == (tuple(range(8)), 8)
    assert serve.cpus == light.cpus == tuple(range(8, 16))
    assert (serve.threads, light.threads) == (4, 4)
    assert [round(slot.share, 3) for slot in (train, serve, light)] == [0.667, 0.333, 0.0]


def test_without_gpus_the_cost_is_shared_by_cpus(tmp_path: Path) -> None:
    text = "[[slots]]\nname = 'a'\ncpus = '0-2'\n[[slots]]\nname = 'b'\ncpus = '5'\n"
    assert [slot.share for slot in cut(tmp_path, text, ())] == [0.75, 0.25]


def test_a_list_of_one_keeps_the_nodes_id(tmp_path: Path) -> None:
    (slot,) = cut(tmp_path, "[[slots]]\nname = 'half'\ngpus = [1]\ncpus = '1,3'\n")
    assert (slot.worker_id, slot.name, slot.gpus, slot.cpus) == ("node", "half", (GPUS[1].uuid,), (1, 3))


A, B = "[[slots]]\nname = 'a'\n", "[[slots]]\nname = 'b'\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{A}gpus = [0]\n{B}gpus = [0]\n", 'slots[1].gpus[0]: GPU 0 is already in slot "a"; name it in one of them'),
        (f"{A}cpus = '0-3'\n{B}cpus = '3-5'\n", 'slots[1].cpus: CPU 3 is already in slot "a"; name it in one of them'),
        (f"{A}{A}", 'slots[1].name: "a" is already the name of slots[0]; choose another one'),
        (f"{A}cpus = '7-3'\n", 'slots[0].cpus: "7-3" runs backwards; write the smaller number first'),
        (f"{A}cpus = '1,0-2'\n", "slots[0].cpus: CPU 1 is listed twice; leave one out"),
        (f"{A}cpus = '0-'\n", 'slots[0].cpus: expected CPU numbers such as "0-7,16", found "0-"'),
        (f"{A}cpus = 3\n", 'slots[0].cpus: expected CPU numbers such as "0-7,16", found 3; put it in quotes'),
        (f"{A}gpus = ['0']\n", "slots[0].gpus[0]: expected a GPU's index or its UUID"),
        (f"{A}gpus = [-1]\n", "slots[0].gpus[0]: expected a GPU's index or its UUID"),
        ("[[slots]]\ngpus = [0]\n", "slots[0].name: missing; it is required"),
        ("[[slots]]\nname = 'a/b'\n", "slots[0].name: expected 1 to 32 letters"),
        (f"{A}cpu = '1'\n", "slots[0].cpu: unknown setting; did you mean 'cpus'?"),
        ("[slots]\nname = 'a'\n", "slots: expected a list, [[slots]], found a mapping of 1 field"),
        ("slots = [1]\n", "slots[0]: expected [[slots]], found a number"),
        (f"[node]\nslots = 'per-gpu'\n{A}", 'node.slots: "per-gpu" and [[slots]] exclude each other; leave one out'),
        ("[node]\nslots = 'gpu'\n", "node.slots: expected one of all, per-gpu, found \"gpu\"; did you mean 'per-gpu'?"),
    ],
)
def test_what_the_file_alone_shows_is_refused_there(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'node.toml'}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{A}gpus = [4]\n", "slots[0].gpus[0]: '4' matches no GPU; this node has: 0 GPU-aaaaaaaa, 1 "),
        (f"{A}gpus = ['GPU-x']\n", "slots[0].gpus[0]: 'GPU-x' matches no GPU"),
        (
            f"{A}gpus = [0]\n{B}gpus = ['GPU-aaaa']\n",
            "slots[1].gpus[0]: 'GPU-aaaa' is GPU-aaaaaaaa, which is already in slot 'a'",
        ),
        (f"{A}cpus = '15-16'\n", "slots[0].cpus: there is no CPU 16 for this node; it has: 0-15"),
        (f"{A}cpus = '0-15'\n{B}", "slots[1].cpus: missing; the other slots have all of this node's CPUs (0-15)"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut(tmp_path, text)
    assert str(caught.value).startswith(said)


def test_slots_are_told_with_the_other_settings_and_set_in_the_file_only(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f"{A}gpus = [0, 'GPU-b']\n")
    rows = {row.key: (row.text, row.origin) for row in describe(load(path, {}))}
    assert rows["slots[0].gpus"] == ('[0, "GPU-b"]', str(path))
    assert rows["slots[0].cpus"] == ("-", str(path))
    with pytest.raises(ConfigError, match=r"^command line: slots: can only be set in the file"):
        load(None, {}, {"slots.name": "a"})


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_list_of_cpus_and_back(cpus: set[int]) -> None:
    assert cpu_numbers(cpu_list(sorted(cpus))) == tuple(sorted(cpus))


def test_a_closed_slot_still_takes_what_needs_none_of_its_gpus() -> None:
    slot: Slot[str] = Slot(SlotPlan(name="a", worker_id="w"))
    slot.queue.extend(["gpu-1", "echo", "gpu-2"])
    slot.faults["GPUs"] = SlotFault(reason="why", concerns=lambda run: run.startswith("gpu"))
    assert slot.trouble == "why"
    assert slot.next() == "echo"
    assert slot.next() is None
    slot.free("echo")
    assert slot.next() is None
    del slot.faults["GPUs"]
    assert slot.next() == "gpu-1"
    assert list(slot.queue) == ["gpu-2"]


def test_a_slot_that_several_tasks_had_before_a_restart_is_free_when_the_last_of_them_is_gone() -> None:
    slot: Slot[str] = Slot(SlotPlan(name="a", worker_id="w"))
    slot.resume("one")
    slot.resume("two")
    slot.queue.append("next")
    assert slot.current == "one"
    slot.free("one")
    assert slot.current == "two"
    assert slot.next() is None
    slot.free("two")
    assert slot.next() == "next"
