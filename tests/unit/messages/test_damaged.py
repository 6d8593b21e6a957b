"""A dispatch that no JSON decoder takes is still answered: its address is found, and its fault is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.text import encode_json, encode_msgpack, escaped, harmless, whole
from flowmesh.messages.wire import address, salvaged_address

OURS = {"task_id": "t-1", "assigned_worker": "w1", "dispatched_at": "now"}
NESTED = 100_000


def dumped(task: Any, *, first: bool = True) -> bytes:
    fields = {**OURS, "task": task} if first else {"task": task, **OURS}
    return json.dumps(fields).encode()


DEEP = b'{"task": {"x": ' + b"[" * NESTED + b"]" * NESTED + b'}, "task_id": "t-1", "assigned_worker": "w1"}'
MAPS = b'{"task": ' + b'{"a":' * NESTED + b"1" + b"}" * NESTED + b', "task_id": "t-1", "assigned_worker": "w1"}'


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("task", "named"),
    [
        ({"x": float("nan")}, "NaN"),
        ({"x": [1, float("-inf")]}, "-Infinity"),
        ({"x": "a\ud83d and \ude00"}, "half a surrogate pair"),
        ({"\udc00": 1}, "half a surrogate pair"),
        ({"text": 'NaN: " } { \\', "task_id": "inner", "x": {"assigned_worker": "w2", "y": float("inf")}}, "Infinity"),
    ],
)
def test_what_python_writes_is_answered(task: Any, named: str, first: bool) -> None:
    data = dumped(task, first=first)
    with pytest.raises(FieldError, match=named):
        address(data)
    found = salvaged_address(data)
    assert (found.task_id, found.assigned_worker, found.dispatched_at) == ("t-1", "w1", "now")


@pytest.mark.parametrize("data", [DEEP, MAPS])
def test_what_is_nested_too_deep_is_answered(data: bytes) -> None:
    with pytest.raises(FieldError, match="too deep"):
        address(data)
    assert (salvaged_address(data).task_id, salvaged_address(data).assigned_worker) == ("t-1", "w1")


@pytest.mark.parametrize(
    "data",
    [
        b'{"task_id": "t-1", "assigned_worker": "w1", "task": {"x": "cut off',
        b'\xef\xbb\xbf{"task_id": "t-1", "assigned_worker": "w1",}',
        b'{"\\u0074ask_id": "t\\u002d1", "assigned_worker" : "w1", "task": NaN}',
    ],
)
def test_other_damage_is_answered(data: bytes) -> None:
    with pytest.raises(FieldError):
        address(data)
    assert (salvaged_address(data).task_id, salvaged_address(data).assigned_worker) == ("t-1", "w1")


@pytest.mark.parametrize("data", [b"", b"no json", b"[NaN]", b'"w1"', b'{"task": {"task_id": "t", "x": NaN}}', b"}{"])
def test_what_names_no_task_has_no_address(data: bytes) -> None:
    assert salvaged_address(data).task_id is None


def test_half_pairs_are_replaced_and_whole_ones_kept() -> None:
    first, second = "a\ud800", "a\udc00"
    value = {first: ["\udcff", "\ud83d\ude00", "ü"], second: float("nan")}
    assert json.loads(encode_json(value)) == {"a\ufffd": ["\ufffd", "😀", "ü"], "a\ufffd\ufffd": None}
    assert encode_msgpack("x\ud800") == encode_msgpack("x\ufffd")
    assert whole("plain") == "plain"


def test_control_characters_are_written_out() -> None:
    assert escaped("a\x1b[31mred\r\n\tb\x9b\u202e\x00é\u200d") == "a\\x1b[31mred\\r\\n\tb\\x9b\\u202e\\0é\u200d"


def test_lines_of_a_log_are_harmless_on_a_terminal() -> None:
    assert harmless(b"\x1b[2Jgone\x07\t\xff\r", str) == b"\\x1b[2Jgone\\x07\t\\xff"
    assert harmless("10 %\r100 % é".encode(), str) == "10 %\n100 % é".encode()
