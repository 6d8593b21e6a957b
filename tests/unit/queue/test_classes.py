"""Requirement classes: equal needs are one class, and who fits it."""

from __future__ import annotations

from typing import Any

import pytest

from flowmesh.errors import FieldError
from flowmesh.queue.classes import RequirementClass, class_of, owner_of, parse

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_total_bytes": 80 * 2**30}
NODE: dict[str, Any] = {
    "cpu": {"logical_cores": 16},
    "memory": {"total_bytes": 64 * 2**30},
    "gpu": {"gpus": [H100, H100]},
}


def of(hardware: dict[str, Any] | None = None, task_type: str = "echo", **resources: Any) -> RequirementClass:
    if hardware is not None:
        resources["hardware"] = hardware
    return class_of({"spec": {"taskType": task_type, "resources": resources}})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"memory": "64Gi"}, {"memory": 64 * 2**30}),
        ({"cpu": "2"}, {"cpu": "2000m"}),
        ({"gpu": {"type": "H100"}}, {"gpu": {"type": "h100 ", "count": 1}}),
        ({"gpu": {"count": 0, "type": "H100"}}, {}),
        ({"gpu": {"count": 2, "type": "any"}}, {"gpu": {"count": 2}}),
        ({}, None),
    ],
)
def test_equal_needs_are_one_class(one: dict[str, Any], other: dict[str, Any] | None) -> None:
    assert of(one).key == of(other).key


def test_other_needs_are_another_class() -> None:
    all_ = [of(), of({"cpu": 2}), of({"memory": "2Gi"}), of({"gpu": {"count": 2}}), of(task_type="sft"), of(tags=["a"])]
    assert len({each.key for each in all_}) == len(all_)
    assert of(tags=["b", "a", "a"]) == of(tags=["a", "b"])


def test_a_member_is_read_back() -> None:
    wanted = of({"cpu": 2, "gpu": {"type": "H100", "memory": "80Gi"}}, tags=["nvlink"])
    assert parse(wanted.member) == wanted
    assert parse("not JSON") is None
    assert parse('{"gpus": "many"}') is None


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (of({"cpu": 16, "memory": "64Gi", "gpu": {"count": 2, "type": "h100", "memory": "80Gi"}}), ""),
        (of({"cpu": 17}), "16 cores, needs 17"),
        (of({"memory": "65Gi"}), "64 GiB of memory, needs 65 GiB"),
        (of({"gpu": {"count": 3}}), "2 GPUs, needs 3"),
        (of({"gpu": {"type": "A100"}}), "no GPU of the type 'a100'"),
        (of(task_type="rag"), "does not offer rag"),
        (of(tags=["nvlink", "fast"]), "lacks the tag 'fast'"),
    ],
)
def test_who_fits(wanted: RequirementClass, reason: str) -> None:
    reasons = wanted.why_not(NODE, ["echo", "sft"], ["nvlink"])
    assert bool(reasons) == bool(reason)
    assert reason in "; ".join(reasons)


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"hardware": {"memory": "much"}}, "spec.resources.hardware.memory"),
        ({"hardware": []}, ""),
        ({"hardware": [1]}, "spec.resources.hardware"),
        ([1], "spec.resources"),
        ({"tags": "fast"}, "spec.resources.tags"),
        ({"tags": [""]}, "spec.resources.tags"),
    ],
)
def test_what_cannot_be_read_names_its_field(resources: Any, field: str) -> None:
    document = {"spec": {"taskType": "echo", "resources": resources}}
    if not field:
        assert class_of(document) == of()
        return
    with pytest.raises(FieldError, match=field):
        class_of(document)


def test_owners() -> None:
    assert [owner_of({"metadata": {"owner": owner}}) for owner in ("ann", 7, None, ["x"], "x" * 500)] == [
        "ann",
        "7",
        "",
        "",
        "x" * 128,
    ]
    assert owner_of({"metadata": None}) == owner_of({}) == ""
