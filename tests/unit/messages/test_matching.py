"""A worker's hardware against a task's: what fits, and the reason where it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.errors import FieldError
from flowmesh.messages.matching import match, parse_bytes, parse_cores

GIB = 2**30


def hardware(*gpus, cores=16, memory=64 * GIB):
    found = [
        {"index": index, "name": name, "uuid": f"GPU-{index}", "memory_total_bytes": size * GIB}
        for index, (name, size) in enumerate(gpus)
    ]
    return {
        "cpu": {"logical_cores": cores, "model": "x"},
        "memory": {"total_bytes": memory},
        "gpu": {"driver_version": None, "cuda_version": None, "gpus": found},
        "network": {"ip": "127.0.0.1"},
    }


H100, T4 = ("NVIDIA H100 80GB HBM3", 80), ("Tesla T4", 15)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"cpu": "16", "memory": "64Gi"},
        {"cpu": 4, "memory": 1 << 30},
        {"cpu": "500m"},
        {"gpu": {"count": 0}},
        {"gpu": {}},
        {"gpu": {"count": 2}},
        {"gpu": {"type": "h100"}},
        {"gpu": {"type": "any", "count": 3}},
        {"gpu": {"type": "H100", "count": 2, "memory": "80Gi"}},
        {"gpu": {"memory": "15Gi", "count": 3}},
    ],
)
def test_fits(wanted):
    assert match(hardware(H100, T4, H100), wanted) == []


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"cpu": "17"}, "16 cores, needs 17"),
        ({"memory": "65Gi"}, "64 GiB of memory, needs 65 GiB"),
        ({"gpu": {"count": 4}}, "3 GPUs, needs 4"),
        (
            {"gpu": {"type": "A100"}},
            "no GPU of the type 'A100', needs 1 (has NVIDIA H100 80GB HBM3, Tesla T4)",
        ),
        (
            {"gpu": {"type": "H100", "count": 3}},
            "2 GPUs of the type 'H100', needs 3 (has NVIDIA H100 80GB HBM3, Tesla T4)",
        ),
        ({"gpu": {"memory": "40Gi", "count": 3}}, "2 GPUs with 40 GiB, needs 3 (the largest has 80 GiB)"),
    ],
)
def test_the_reason(wanted, reason):
    assert match(hardware(H100, T4, H100), wanted) == [reason]


def test_every_reason_is_told():
    reasons = match(hardware(cores=1, memory=GIB), {"cpu": "2", "memory": "2Gi", "gpu": {"count": 1}})
    assert reasons == ["1 core, needs 2", "1 GiB of memory, needs 2 GiB", "no GPU, needs 1"]


@pytest.mark.parametrize("broken", [{}, {"cpu": None, "memory": 3, "gpu": {"gpus": [None, "x"]}}, {"gpu": []}])
def test_hardware_that_is_not_told_is_not_there(broken):
    assert len(match(broken, {"cpu": 1, "memory": 1 << 30, "gpu": {"count": 1}})) == 3
    assert match(broken, {}) == []


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"cpu": "many"}, "spec.resources.hardware.cpu"),
        ({"cpu": []}, "spec.resources.hardware.cpu"),
        ({"memory": "64 apples"}, "spec.resources.hardware.memory"),
        ({"gpu": {"count": -1}}, "spec.resources.hardware.gpu.count"),
        ({"gpu": {"count": "two"}}, "spec.resources.hardware.gpu.count"),
        ({"gpu": {"memory": "lots"}}, "spec.resources.hardware.gpu.memory"),
        ({"gpu": "H100"}, "spec.resources.hardware.gpu"),
    ],
)
def test_a_requirement_that_cannot_be_read_names_its_field(wanted, field):
    with pytest.raises(FieldError) as caught:
        match(hardware(H100), wanted)
    assert caught.value.path == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64Gi", 64 * GIB),
        ("64GiB", 64 * GIB),
        ("64G", 64 * 10**9),
        ("64GB", 64 * 10**9),
        ("1.5Ki", 1536),
        (7_000_000, 7_000_000),
        ("7000000", 7_000_000),
        (0, 0),
        ("512Mi", GIB // 2),
        ("1Ti", 1024 * GIB),
        ("2k", 2000),
        (" 1 Gi ", GIB),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text, "f") == size


@pytest.mark.parametrize("text", ["", "Gi", "-1Gi", "1iB", "1XB", "1Gi2", "٣Gi", "1e3"])
def test_no_sizes(text):
    with pytest.raises(FieldError, match=r"^f: "):
        parse_bytes(text, "f")


@pytest.mark.parametrize("value", ["80", 80, "80B", "0.5", 1048575])
def test_a_number_without_unit_that_no_memory_has_is_refused(value):
    with pytest.raises(FieldError, match=r"^f: .* bytes; with a unit it is [\d.]+Gi or "):
        parse_bytes(value, "f")


@given(st.text())
def test_any_text_is_a_size_or_a_clear_error(text):
    for parse in (parse_bytes, parse_cores):
        try:
            size = parse(text, "f")
        except FieldError as error:
            size, said = 0, str(error)
            assert said.startswith("f: ")
        assert size >= 0


@given(
    st.tuples(st.integers(0, 8), st.integers(1, 200), st.integers(1, 64)),
    st.tuples(st.integers(0, 9), st.integers(1, 200), st.integers(1, 64)),
)
def test_fits_exactly_when_there_is_enough(there, needed):
    (have, size, cores), (need, need_size, need_cores) = there, needed
    wanted = {"cpu": str(need_cores), "gpu": {"count": need, "memory": f"{need_size}Gi"}}
    fits = match(hardware(*[("X", size)] * have, cores=cores), wanted) == []
    assert fits == (cores >= need_cores and (need == 0 or (have >= need and size >= need_size)))
