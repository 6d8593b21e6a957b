"""Xids: whose fault, whose task, and when a card is taken out and let in again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.node.devices import EventKind, GpuEvent, GpuInfo, GpuLost, GpuProcess, GpuSample, MigSlice
from flowmesh.node.health import GpuHealth
from flowmesh.node.xid import XidVerdict, describe_xid, xid_verdict


def gpu(uuid: str, mig: MigSlice | None = None) -> GpuInfo:
    return GpuInfo(index=0, uuid=uuid, name="NVIDIA H100", memory_total_bytes=1, mig=mig)


def look(uuid: str, *pids: int, throttled: tuple[str, ...] = ()) -> GpuSample:
    processes = tuple(GpuProcess(pid) for pid in pids)
    return GpuSample(uuid=uuid, board=uuid, used_bytes=0, processes=processes, throttled=throttled)


def xid(number: int, board: str | None = "GPU-a", gpu_instance: int | None = None) -> GpuEvent:
    return GpuEvent(kind=EventKind.XID, board=board, xid=number, gpu_instance=gpu_instance)


A, B = gpu("GPU-a"), gpu("GPU-b")


@pytest.mark.parametrize(
    ("verdict", "numbers"),
    [
        (XidVerdict.APPLICATION, [8, 13, 31, 32, 43, 68, 69, 94, 137]),
        (XidVerdict.DEVICE, [46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 144, 150, 158]),
        (XidVerdict.IGNORE, [37, 45, 63, 92, 106, 154, 171, 172]),
        (XidVerdict.DEVICE, [0, 999]),
    ],
)
def test_the_catalogue_is_followed_and_the_unknown_is_not_trusted(verdict: XidVerdict, numbers: list[int]) -> None:
    assert {number: xid_verdict(number) for number in numbers} == dict.fromkeys(numbers, verdict)


@given(st.integers(0, 10_000))
def test_every_xid_can_be_told(number: int) -> None:
    assert describe_xid(number).startswith(f"Xid {number}")


def test_an_application_xid_blames_the_task_and_spares_the_card() -> None:
    health = GpuHealth([A, B])
    health.observe({"GPU-a": look("GPU-a", 42), "GPU-b": look("GPU-b", 43)})
    (finding,) = health.judge([xid(31)])
    assert (finding.verdict, finding.uuids, finding.pids, finding.xid) == (
        XidVerdict.APPLICATION,
        ("GPU-a",),
        {42},
        31,
    )
    assert "Xid 31" in finding.message
    assert health.condemned(["GPU-a", "GPU-b"]) == {}


def test_a_device_xid_condemns_its_card_until_a_canary_clears_it() -> None:
    health = GpuHealth([A, B])
    health.judge([xid(79), xid(31)])
    assert health.condemned(["GPU-a", "GPU-b"]) == {"GPU-a": "Xid 79 (the GPU fell off the PCIe bus) on GPU-a"}, (
        "the first reason stays"
    )
    health.observe({"GPU-a": look("GPU-a")})
    assert health.condemned(["GPU-a"]), "answering again is not yet working"
    health.readmit(["GPU-a"])
    assert health.condemned(["GPU-a"]) == {}


def test_an_ecc_event_is_the_cards() -> None:
    (finding,) = GpuHealth([A]).judge([GpuEvent(kind=EventKind.ECC_DOUBLE_BIT, board="GPU-a")])
    assert finding.verdict is XidVerdict.DEVICE


def test_an_event_of_no_named_board_concerns_them_all() -> None:
    health = GpuHealth([A, B])
    health.judge([xid(79, board=None)])
    assert set(health.condemned(["GPU-a", "GPU-b"])) == {"GPU-a", "GPU-b"}


def test_an_event_of_a_card_that_is_not_ours_concerns_nobody() -> None:
    health = GpuHealth([A])
    (finding,) = health.judge([xid(79, board="GPU-z")])
    assert (finding.uuids, finding.pids) == ((), frozenset())


def test_a_fault_of_a_slice_spares_its_neighbours() -> None:
    first, second = gpu("MIG-1", MigSlice("GPU-a", 1, 0)), gpu("MIG-2", MigSlice("GPU-a", 2, 0))
    health = GpuHealth([first, second])
    assert health.judge([xid(48, gpu_instance=2)])[0].uuids == ("MIG-2",)
    assert health.judge([xid(79)])[0].uuids == ("MIG-1", "MIG-2")


def test_who_has_just_died_is_still_blamed_until_the_card_is_cleared() -> None:
    health = GpuHealth([A])
    health.observe({"GPU-a": look("GPU-a", 42)})
    health.observe({"GPU-a": look("GPU-a")})
    assert health.judge([xid(31)])[0].pids == {42}
    health.cleared(["GPU-a"])
    assert health.judge([xid(31)])[0].pids == frozenset()


def test_a_card_that_falls_silent_is_found_once() -> None:
    health = GpuHealth([A])
    health.observe({"GPU-a": look("GPU-a", 42)})
    (finding,) = health.observe({"GPU-a": GpuLost("GPU-a", "GPU is lost")})
    assert (finding.verdict, finding.pids) == (XidVerdict.DEVICE, {42})
    assert health.observe({"GPU-a": GpuLost("GPU-a", "GPU is lost")}) == ()
    assert health.condemned(["GPU-a"]) == {"GPU-a": "GPU-a does not answer: GPU is lost"}


def test_throttling_is_told_while_it_lasts() -> None:
    health = GpuHealth([A])
    health.observe({"GPU-a": look("GPU-a", throttled=("hw_thermal",))})
    assert health.throttled(["GPU-a", "GPU-b"]) == {"GPU-a": ("hw_thermal",)}
    health.observe({"GPU-a": look("GPU-a")})
    assert health.throttled(["GPU-a"]) == {}
