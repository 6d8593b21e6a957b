"""CUDA_VISIBLE_DEVICES: what CUDA takes is taken, and what names nothing is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.errors import ConfigError
from flowmesh.node.devices import GpuInfo, MigSlice, visible_gpus


def gpu(index: int, uuid: str, mig: MigSlice | None = None) -> GpuInfo:
    return GpuInfo(index=index, uuid=uuid, name="NVIDIA A100", memory_total_bytes=1, mig=mig)


A, B, C = gpu(0, "GPU-aa11"), gpu(1, "GPU-aa22"), gpu(2, "GPU-cc33")
PLAIN = (A, B, C)
SLICE_1 = gpu(0, "MIG-1111", MigSlice("GPU-aa11", 1, 0))
SLICE_2 = gpu(0, "MIG-2222", MigSlice("GPU-aa11", 2, 0))
SLICED = (SLICE_1, SLICE_2, B)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, PLAIN),
        ("", ()),
        ("  ", ()),
        ("NoDevFiles", ()),
        ("2,0", (C, A)),
        (" 1 , 2 ", (B, C)),
        ("GPU-aa22", (B,)),
        ("GPU-c", (C,)),
        ("gpu-CC33,0", (C, A)),
        ("-1", ()),
        ("1,-1,0", (B,)),
        ("0,-1,nonsense", (A,)),
    ],
)
def test_it_chooses_as_cuda_does(setting: str | None, expected: tuple[GpuInfo, ...]) -> None:
    assert visible_gpus(PLAIN, setting) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, SLICED),
        ("MIG-2222", (SLICE_2,)),
        ("MIG-2,1", (SLICE_2, B)),
        ("MIG-GPU-aa11/1/0", (SLICE_1,)),
    ],
)
def test_it_names_mig_slices(setting: str | None, expected: tuple[GpuInfo, ...]) -> None:
    assert visible_gpus(SLICED, setting) == expected


@pytest.mark.parametrize(
    ("gpus", "setting", "says"),
    [
        (PLAIN, "3", r"'3' matches no GPU; this node has: 0 GPU-aa11, 1 GPU-aa22, 2 GPU-cc33"),
        (PLAIN, "0,GPU-ffff", r"'GPU-ffff' matches no GPU"),
        (PLAIN, "all", r"'all' matches no GPU"),
        (PLAIN, "GPU-aa", r"'GPU-aa' matches more than one GPU: 0 GPU-aa11, 1 GPU-aa22"),
        (PLAIN, "0,GPU-aa11", r"'GPU-aa11' names GPU-aa11 a second time"),
        (PLAIN, "0,,1", r"an entry is empty"),
        (PLAIN, "0,", r"an entry is empty"),
        ((), "0", r"'0' matches no GPU; this node has: none"),
        (SLICED, "0", r"'0' is partitioned into MIG slices; name a slice: 0 MIG-1111, 0 MIG-2222"),
        (SLICED, "GPU-aa11", r"'GPU-aa11' is partitioned into MIG slices"),
        (SLICED, "MIG-GPU-aa11/9/0", r"matches no GPU"),
    ],
)
def test_what_names_nothing_is_an_error_that_names_it(gpus: tuple[GpuInfo, ...], setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        visible_gpus(gpus, setting)


def test_where_some_gpus_are_down_what_names_nothing_is_left_out() -> None:
    assert visible_gpus(PLAIN, "0,3,GPU-ffff,2", some_are_down=True) == (PLAIN[0], PLAIN[2])
    assert visible_gpus((), "0,1", some_are_down=True) == ()
    with pytest.raises(ConfigError, match="more than one"):
        visible_gpus(PLAIN, "GPU-aa", some_are_down=True)


@given(st.permutations(PLAIN), st.data())
def test_any_choice_by_index_or_uuid_comes_back_in_its_order(order: list[GpuInfo], data: st.DataObject) -> None:
    chosen = order[: data.draw(st.integers(1, 3))]
    names = [data.draw(st.sampled_from([str(each.index), each.uuid])) for each in chosen]
    assert visible_gpus(PLAIN, ",".join(names)) == tuple(chosen)


@given(st.text(alphabet="0123456789GPUMIG-/, af", max_size=20))
def test_any_setting_is_a_choice_or_an_error(setting: str) -> None:
    try:
        chosen = visible_gpus(SLICED, setting)
    except ConfigError:
        return
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(SLICED)
