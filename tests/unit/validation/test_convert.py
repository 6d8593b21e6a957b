"""Errors of documents: the true path, what stood there, what is allowed, in plain words and one line."""

from __future__ import annotations

import datetime
import enum
import math
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from flowmesh.redaction import is_secret_name, redact_url
from flowmesh.validation.convert import FieldError, convert, nearest

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


class Mode(enum.StrEnum):
    FAST = "fast"
    SLOW = "slow"
    OFF = "off"


class Local(msgspec.Struct, tag="local", forbid_unknown_fields=True):
    path: str


class Http(msgspec.Struct, tag="http", forbid_unknown_fields=True):
    url: str
    timeoutSec: Annotated[float, Meta(gt=0)] = 15


class Range(msgspec.Struct):
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low must not be over high")


class Environment(msgspec.Struct, forbid_unknown_fields=True):
    python: str = ""
    level: Annotated[int, Meta(ge=0, le=9)] = 1


class Document(msgspec.Struct, forbid_unknown_fields=True):
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    weight: float = 1.0
    maybe: float | None = None
    count: int = 0
    even: Annotated[int, Meta(multiple_of=2)] = 2
    flag: bool = False
    name: str = ""
    short: Annotated[str, Meta(min_length=1, max_length=3)] = "a"
    code: Annotated[str, Meta(pattern="^[a-z]+$", description="lower-case letters")] = "a"
    mode: Mode = Mode.FAST
    kind: Literal["ip", "l2"] = "ip"
    size: str | int | None = None
    rows: list[list[int]] = []
    pair: tuple[int, str] = (1, "")
    few: Annotated[tuple[str, ...], Meta(max_length=2)] = ()
    destination: Local | Http | None = None
    environments: dict[str, Environment] = {}
    destinations: dict[str, Local | Http] = {}
    labels: dict[Annotated[str, Meta(max_length=3)], int] = {}
    free: Any = None
    ranges: dict[str, list[Range]] = {}
    messages: str | list[dict[str, str]] | None = None
    api_key: str | None = None
    weights: dict[str, list[float]] = {}
    nested: list[Document] = []


def refusal(value: Any, *, where: str = "", strict: bool = True) -> str:
    with pytest.raises(FieldError) as caught:
        convert(value, Document, where=where, strict=strict)
    text = str(caught.value)
    assert text.startswith(f"{caught.value.path or 'the document'}: ")
    assert text.isprintable(), "one line, nothing that a terminal would obey"
    return text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"top_p": "often"}, 'top_p: expected a number > 0 and <= 1, found "often"'),
        ({"top_p": "0.5"}, 'top_p: expected a number > 0 and <= 1, found "0.5"; write it without quotes'),
        ({"top_p": 2}, "top_p: expected a number > 0 and <= 1, found 2"),
        ({"top_p": True}, "top_p: expected a number > 0 and <= 1, found true"),
        ({"top_p": math.nan}, "top_p: expected a number > 0 and <= 1, found NaN"),
        ({"weight": math.nan}, "weight: expected a number, found NaN"),
        ({"weight": -math.inf}, "weight: expected a number, found -infinity"),
        ({"maybe": math.inf}, "maybe: expected a number, found infinity"),
        ({"weight": 10**400}, "weight: expected a number, found a huge number"),
        ({"top_p": 16**5000}, "top_p: expected a number > 0 and <= 1, found a huge number"),
        ({"weights": {"a.b": [1, math.nan]}}, 'weights."a.b"[1]: expected a number, found NaN'),
        ({"nested": [{}, {"weight": math.inf}]}, "nested[1].weight: expected a number, found infinity"),
        ({"count": True}, "count: expected a whole number, found true"),
        ({"count": 1.0}, "count: expected a whole number, found 1.0"),
        ({"count": None}, "count: expected a whole number, found null"),
        ({"count": []}, "count: expected a whole number, found an empty list"),
        ({"even": 3}, "even: expected a whole number, a multiple of 2, found 3"),
        ({"flag": 1}, "flag: expected true or false, found 1"),
        ({"flag": "true"}, 'flag: expected true or false, found "true"; write it without quotes'),
        ({"name": 1.5}, "name: expected text, found 1.5; put it in quotes"),
        ({"name": datetime.date(2026, 1, 2)}, "name: expected text, found 2026-01-02; put it in quotes"),
        ({"name": [1, 2]}, "name: expected text, found a list of 2 items"),
        ({"short": ""}, 'short: expected text of 1 to 3 characters, found ""'),
        ({"code": "A\nB"}, 'code: expected lower-case letters, found "A\\nB"'),
        ({"code": "\x1b[31m"}, 'code: expected lower-case letters, found "\\u001b[31m"'),
        ({"mode": "fats"}, "mode: expected one of fast, slow, off, found \"fats\"; did you mean 'fast'?"),
        ({"mode": False}, "mode: expected one of fast, slow, off, found false; put it in quotes"),
        ({"mode": 3}, "mode: expected one of fast, slow, off, found 3"),
        ({"mode": "\udcff"}, 'mode: expected one of fast, slow, off, found "\\udcff"'),
        (
            {"destinations": {"\udcff": {"type": "ftp"}}},
            'destinations."\\udcff".type: expected one of http, local, found "ftp"',
        ),
        ({"\udcff": 1}, '"\\udcff": unknown field; known: api_key'),
        ({"kind": "l3"}, 'kind: expected one of ip, l2, found "l3"'),
        ({"size": []}, "size: expected text or a whole number, found an empty list"),
        ({"rows": [[1], [2, "x"]]}, 'rows[1][1]: expected a whole number, found "x"'),
        ({"rows": {"a": 1}}, "rows: expected a list, found a mapping of 1 field"),
        ({"pair": [1]}, "pair: expected a list of 2 items, found a list of 1 item"),
        ({"pair": [1, 2]}, "pair[1]: expected text, found 2; put it in quotes"),
        ({"few": ["a", "b", "c"]}, "few: expected a list of at most 2 items, found a list of 3 items"),
        ({"destination": 3}, "destination: expected a mapping, found 3"),
        ({"destination": {}}, "destination.type: missing; expected one of http, local"),
        (
            {"destination": {"type": "htp"}},
            "destination.type: expected one of http, local, found \"htp\"; did you mean 'http'?",
        ),
        ({"destination": {"type": 3}}, "destination.type: expected one of http, local, found 3"),
        ({"destination": {"type": "http"}}, "destination.url: missing; it is required"),
        (
            {"destination": {"type": "http", "url": "x", "path": "y"}},
            "destination.path: unknown field; known: timeoutSec, url",
        ),
        (
            {"destination": {"type": "http", "url": "x", "timeoutSec": 0}},
            "destination.timeoutSec: expected a number > 0, found 0",
        ),
        ({"destinations": {"a": {"type": "ftp"}}}, 'destinations.a.type: expected one of http, local, found "ftp"'),
        ({"environments": {"vllm": {"pyton": "x"}}}, "environments.vllm.pyton: unknown field; did you mean 'python'?"),
        (
            {"environments": {"ok": {}, "a b`.[...]": {"level": 10}}},
            'environments."a b`.[...]".level: expected a whole number from 0 to 9, found 10',
        ),
        ({"environments": [1]}, "environments: expected a mapping, found a list of 1 item"),
        ({"labels": {"abcd": 1}}, "labels.abcd: its name must be text of at most 3 characters"),
        ({"labels": {1: 1}}, "labels: a name here must be text of at most 3 characters, found 1; put it in quotes"),
        ({"ranges": {"x": [{"low": 1, "high": 2}, {"low": 3, "high": 2}]}}, "ranges.x[1]: low must not be over high"),
        ({"ranges": {"x": [{"low": 1}]}}, "ranges.x[0].high: missing; it is required"),
        ({"messages": [{"role": "user"}, {"role": 3}]}, "messages[1].role: expected text, found 3; put it in quotes"),
        ({"messages": 3}, "messages: expected text or a list, found 3; put it in quotes"),
        ({"topP": 1}, "topP: unknown field; did you mean 'top_p'?"),
        ({"a\nb": 1}, '"a\\nb": unknown field; known: api_key'),
        ({1: 2}, "the document: a field's name must be text, found 1; put it in quotes"),
        ([], "the document: expected a mapping, found an empty list"),
        (None, "the document: expected a mapping, found null"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(value: Any, text: str) -> None:
    if text.endswith("known: api_key"):
        assert refusal(value).startswith(text)
    else:
        assert refusal(value) == text


@pytest.mark.parametrize("where", ["spec", "merge_children[2].spec"])
def test_the_path_starts_where_the_value_stood(where: str) -> None:
    assert refusal({"rows": [["x"]]}, where=where).startswith(f"{where}.rows[0][0]: ")
    assert refusal([], where=where).startswith(f"{where}: ")


def test_a_list_at_the_top_has_no_dot_before_its_index() -> None:
    with pytest.raises(FieldError) as caught:
        convert([1, "x"], list[int], where="spec.rows")
    assert caught.value.path == "spec.rows[1]"


def test_secrets_are_not_quoted() -> None:
    assert refusal({"api_key": 31337}) == "api_key: expected text, found a number; put it in quotes"
    shown = refusal({"mode": "redis://worker:hunter2@host/0?token=hunter2"})
    assert "hunter2" not in shown
    assert "worker" in shown


def test_the_first_fault_in_a_long_document_is_cut_short() -> None:
    assert len(refusal({"code": "X" * 10_000})) < 200
    assert len(refusal({"environments": {"x" * 10_000: 3}})) < 200


def test_not_strict_takes_numbers_and_truth_as_text_but_still_no_infinity() -> None:
    taken = convert({"top_p": "0.5", "flag": "true", "count": "3"}, Document, where="", strict=False)
    assert (taken.top_p, taken.flag, taken.count) == (0.5, True, 3)
    assert refusal({"weight": "inf"}, strict=False) == 'weight: expected a number, found "inf"'


def test_whole_numbers_do_for_numbers_and_nan_may_stand_where_anything_may() -> None:
    assert convert({"weight": 3}, Document, where="").weight == 3.0
    free = convert({"free": {"x": math.nan}}, Document, where="").free
    assert math.isnan(free["x"])


def test_nesting_without_an_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["nested"] = [endless]
    assert refusal(endless) == "the document: nested too deep"


def test_types_that_the_walk_does_not_know_still_get_a_path() -> None:
    class Timed(msgspec.Struct):
        at: datetime.datetime

    with pytest.raises(FieldError, match=r"^spec\.at: invalid RFC3339 encoded datetime$"):
        convert({"at": "soon"}, Timed, where="spec")


any_text = st.text(st.characters(), max_size=5)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text | st.integers(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = list(Document.__struct_fields__)


@given(st.dictionaries(st.sampled_from(FIELDS), plain, min_size=1, max_size=3))
@patient
def test_any_junk_is_either_taken_or_refused_with_a_field_that_is_at_fault(value: dict[str, Any]) -> None:
    try:
        convert(value, Document, where="")
        return
    except FieldError as error:
        refused = error
    name = refused.path.split(".")[0].split("[")[0]
    assert str(refused).isprintable()
    with pytest.raises(FieldError) as alone:
        convert({name: value[name]}, Document, where="")
    assert alone.value.faults == refused.faults[: len(alone.value.faults)], (
        "the field that is named is at fault by itself"
    )


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
@patient
def test_the_true_key_is_named_whatever_it_is(good: str, bad: str) -> None:
    assume(not is_secret_name(bad))  # what lies in a secret is not shown
    text = refusal({"environments": {good: {}, bad: {"level": 10}}})
    assert text.endswith(".level: expected a whole number from 0 to 9, found 10")
    if bad.isascii() and bad.isalnum():
        assert text.startswith(f"environments.{bad}.level: ")


def test_nearest() -> None:
    assert nearest("maxNewTokens", ["max_new_tokens", "max_tokens"]) == "did you mean 'max_new_tokens'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "nothing is allowed here"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://:6379", "redis://:6379"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://:pw@host:6379/0", "redis://:[hidden]@host:6379/0"),
        ("redis://worker:pw@host", "redis://worker:[hidden]@host"),
        ("redis://pw@host", "redis://[hidden]@host"),
        ("redis://worker:p@/#?w@host", "redis://worker:[hidden]@host"),
        ("redis://:12/34@host", "redis://:[hidden]@host"),
        ("redis://:pw", "redis://[hidden]"),
        ("unix://u:pw@/run/redis.sock?password=pw&db=1", "unix://u:[hidden]@/run/redis.sock?password=[hidden]&db=1"),
        ("https://hub/@owner/model", "https://hub/@owner/model"),
        ("https://pw@hub/model", "https://[hidden]@hub/model"),
        ("https://s3/x?X-Amz-Signature=pw&part=1&sig=pw", "https://s3/x?X-Amz-Signature=[hidden]&part=1&sig=[hidden]"),
        ("pw", "[hidden]"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@given(st.sampled_from(["redis", "rediss", "unix"]), st.text("pw@:/#?&=%", max_size=12))
@patient
def test_no_password_gets_through(scheme: str, password: str) -> None:
    shown = redact_url(f"{scheme}://user:{password}SECRET{password}@host:6379/0")
    assert "SECRET" not in shown
    assert shown.endswith("@host:6379/0")
