from __future__ import annotations

from typing import Any

import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.output import HttpDestination, LocalDestination, Output, file_url, read_output


def http(**fields: Any) -> dict[str, Any]:
    return {"destination": {"type": "http", "url": "http://host/results", **fields}}


def read_http(value: dict[str, Any], **options: Any) -> HttpDestination:
    destination = read_output(value, **options).destination
    assert isinstance(destination, HttpDestination)
    return destination


def test_no_output_stays_on_this_disk() -> None:
    assert read_output(None) == Output(destination=LocalDestination(), artifacts=())
    assert read_output({}) == Output()


def test_all_fields_of_the_contract() -> None:
    destination = read_http(http(method="put", headers={"X-Key": "v", "Content-Type": "a/b"}, timeoutSec=3))
    assert destination.method == "PUT"
    assert destination.headers == {"X-Key": "v", "Content-Type": "a/b"}
    assert destination.timeout_s == 3.0
    plain = read_http(http())
    assert (plain.method, plain.headers, plain.timeout_s) == ("POST", {}, 15.0)


def test_the_orchestrator_is_the_address_where_the_task_names_none() -> None:
    value = {"destination": {"type": "http"}}
    assert read_http(value, orchestrator_url="http://o:8000/").url == "http://o:8000/api/v1/results"
    with pytest.raises(FieldError, match="ORCHESTRATOR_BASE_URL") as caught:
        read_output(value)
    assert caught.value.path == "spec.output.destination.url"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"destinatoin": {}}, "spec.output.destinatoin"),
        ({"destination": {"type": "ftp"}}, "spec.output.destination.type"),
        ({"destination": {"type": "local", "url": "http://x"}}, "spec.output.destination.url"),
        (http(url="ftp://host/x"), "spec.output.destination.url"),
        (http(url="http:///x"), "spec.output.destination.url"),
        (http(url="http://host:99999/"), "spec.output.destination.url"),
        (http(url="http://ho st/"), "spec.output.destination.url"),
        (http(url="file:///etc/passwd"), "spec.output.destination.url"),
        (http(method="GET"), "spec.output.destination.method"),
        (http(method="DELETE"), "spec.output.destination.method"),
        (http(timeoutSec=0), "spec.output.destination.timeoutSec"),
        (http(timeoutSec=float("nan")), "spec.output.destination.timeoutSec"),
        (http(timeoutSec="15"), "spec.output.destination.timeoutSec"),
        (http(headers={"X-A": "a\r\nX-B: b"}), "spec.output.destination.headers.X-A"),
        (http(headers={"X-A": "a\n"}), "spec.output.destination.headers.X-A"),
        (http(headers={"X-A": "ü"}), "spec.output.destination.headers.X-A"),
        (http(headers={"X A": "a"}), "spec.output.destination.headers"),
        (http(headers={"": "a"}), "spec.output.destination.headers"),
        (http(headers={"content-LENGTH": "1"}), "spec.output.destination.headers.content-LENGTH"),
        (http(headers={"Transfer-Encoding": "chunked"}), "spec.output.destination.headers.Transfer-Encoding"),
        (http(headers={"X-A": "1", "x-a": "2"}), "spec.output.destination.headers.x-a"),
        ({"artifacts": ["../x"]}, "spec.output.artifacts[0]"),
        ({"artifacts": ["a", "/etc/passwd"]}, "spec.output.artifacts[1]"),
        ({"artifacts": ["a/../../b"]}, "spec.output.artifacts[0]"),
        ({"artifacts": [""]}, "spec.output.artifacts[0]"),
        ({"artifacts": ["."]}, "spec.output.artifacts[0]"),
        ({"artifacts": ["a\x00b"]}, "spec.output.artifacts[0]"),
        ({"artifacts": ["a" * 300]}, "spec.output.artifacts[0]"),
        ({"artifacts": "logs"}, "spec.output.artifacts"),
        ({**http(), "artifacts": ["a/x.txt", "b/x.txt"]}, "spec.output.artifacts[1]"),
    ],
)
def test_what_cannot_be_delivered_to_is_refused_with_its_path(value: dict[str, Any], path: str) -> None:
    with pytest.raises(FieldError) as caught:
        read_output(value)
    assert caught.value.path == path
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        http(url="http://user:hunter2/x@host:bad/"),
        http(url="ftp://user:hunter2@host/?key=hunter2"),
        http(headers={"X-A": "hunter2\r\n"}),
        http(headers={"X-A": "hunter2ü"}),
        http(headers="Bearer hunter2"),
        http(headers={"Authorization: Bearer hunter2": "x"}),
    ],
)
def test_an_error_shows_no_secret(value: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as caught:
        read_output(value)
    assert "hunter2" not in str(caught.value)


def test_the_same_name_twice_is_fine_on_disk() -> None:
    assert read_output({"artifacts": ["a/x.txt", "b/x.txt"]}).artifacts == ("a/x.txt", "b/x.txt")


@pytest.mark.parametrize(
    ("url", "name", "expected"),
    [
        ("http://h/r", None, "http://h/r/t-1/files"),
        ("http://h/r/", None, "http://h/r/t-1/files"),
        ("http://u:p@h/r?key=k#f", None, "http://u:p@h/r/t-1/files?key=k"),
        ("http://u:p@h:80/r?key=k#f", "a b.txt", "http://h:80/r/t-1/files/a%20b.txt"),
        ("http://h", "ü/..", "http://h/t-1/files/%C3%BC%2F.."),
        ("http://h/r", "{name}", "http://h/r/t-1/files/{name}"),
    ],
)
def test_where_files_go_and_where_they_are_found(url: str, name: str | None, expected: str) -> None:
    assert file_url(url, "t-1", name) == expected


def test_a_task_id_stays_readable_in_an_address() -> None:
    assert file_url("http://h", "a:b@c=d+e") == "http://h/a:b@c=d+e/files"
