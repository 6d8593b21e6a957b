"""One body to one real server that accepts, refuses, stalls, resets, redirects and answers late."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from flowmesh.results.http_errors import retry_after_s
from flowmesh.results.request_bodies import FileBody, UploadError
from tests.kit.http_server import Answer, Reset, Server, Stall
from tests.kit.upload import SIZE, assert_whole, send_file, uploader


def test_a_file_arrives_as_the_contract_says(artifact: Path) -> None:
    with Server() as server:
        told: list[int] = []
        send_file(uploader(server.url + "/r", progress=told.append), server.url + "/r", artifact)
        (received,) = server.received
    assert (received.method, received.path) == ("POST", "/r/t-1/files")
    assert received.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert received.file_name == "weights.bin"
    assert_whole(received, artifact)
    assert told == sorted(told)
    assert told[-1] == int(received.headers["content-length"]) == FileBody.at(artifact, "weights.bin").size


@pytest.mark.parametrize("name", ["a b.txt", 'quo"te', "ünï.bin", "semi;colon"])
def test_odd_names_survive(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with Server() as server:
        send_file(uploader(server.url), server.url, tmp_path / "x", name)
        assert list(server.files()) == [name]


def test_an_empty_file_arrives(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with Server() as server:
        send_file(uploader(server.url), server.url, tmp_path / "empty", "empty")
        assert server.files()["empty"].file_size == 0


@pytest.mark.parametrize(
    "plan",
    [
        [Answer(500), Answer(503), Answer(429), Answer(408), Answer(425)],
        [Answer(500, early=True), Answer(429, early=True)],
        [Reset(0), Reset(1000), Reset(SIZE // 2)],
    ],
    ids=["answers", "early", "resets"],
)
def test_what_may_pass_is_tried_again_with_the_whole_body(artifact: Path, plan: list[Any]) -> None:
    with Server(*plan) as server:
        tries = len(plan) + 1
        send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == tries
        (received,) = server.received
    assert_whole(received, artifact)


JSON = {"Content-Type": "application/json; charset=utf-8"}


@pytest.mark.parametrize(
    "body",
    [b'{"ok": false, "detail": "disk full"}', b'{"error": "disk full"}', b'{"success": false, "error": "disk full"}'],
)
def test_a_success_that_reports_an_error_is_none(artifact: Path, body: bytes) -> None:
    with Server(Answer(200, body, JSON)) as server:
        send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == 2
    with (
        Server(Answer(200, body, JSON)) as server,
        pytest.raises(UploadError, match=r"answered 200, and that it failed: .*disk full"),
    ):  # the time for a second attempt is up before it is due
        send_file(uploader(server.url, within_s=10.0, first_backoff_s=100.0, max_backoff_s=100.0), server.url, artifact)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"ok": true, "error": "a note"}', JSON),
        (b'{"error": null}', JSON),
        (b'{"error": "not', JSON),
        (b'[{"error": "x"}]', JSON),
        (b'{"error": "in a page"}', {"Content-Type": "text/html"}),
        (b'{"error": "' + b"x" * 5000 + b'"}', JSON),
    ],
)
def test_any_other_body_of_a_success_is_not_read(artifact: Path, body: bytes, headers: dict[str, str]) -> None:
    with Server(Answer(200, body, headers)) as server:
        send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == 1


def test_an_acceptance_before_the_end_is_none(tmp_path: Path) -> None:
    """The file is larger than the buffers of both sockets, so the server has not received all of it."""
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(1 << 20) * 24)
    with Server(Answer(200, early=True)) as server:
        send_file(uploader(server.url), server.url, large, "large.bin")
        assert len(server.requests) == 2
        assert_whole(server.files()["large.bin"], large)


def test_a_stall_ends_with_the_attempts_timeout_and_is_tried_again(artifact: Path) -> None:
    with Server(Stall(100_000), Stall(SIZE)) as server:
        send_file(uploader(server.url, fields={"timeoutSec": 0.3}), server.url, artifact)
        (received,) = server.received
    assert_whole(received, artifact)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 451])
@pytest.mark.parametrize("early", [False, True])
def test_other_4xx_are_final_and_told_with_the_answer(artifact: Path, status: int, early: bool) -> None:
    with Server(Answer(status, b'{"detail": "not\nlike this"}', early=early)) as server:
        with pytest.raises(UploadError, match=r'not like this"') as caught:
            send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == 1
    assert caught.value.status == status
    assert f"answered {status}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_is_cut_after_200_characters(artifact: Path) -> None:
    with Server(Answer(400, b"x" * 5000)) as server, pytest.raises(UploadError) as caught:
        send_file(uploader(server.url), server.url, artifact)
    assert str(caught.value).count("x") == 200


def test_an_answer_that_trickles_is_cut_short(artifact: Path) -> None:
    with Server(Answer(403, b"never the end of it" * 50, trickle_s=0.05)) as server:
        with pytest.raises(UploadError, match="never the") as caught:
            send_file(uploader(server.url, fields={"timeoutSec": 0.5}), server.url, artifact)
        assert caught.value.status == 403
        assert len(str(caught.value)) < 150


def test_nobody_listening_is_tried_until_time_is_up(artifact: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UploadError, match=r"Connection refused; gave up after \d+ s and ([3-9]|\d\d+) attempts"):
            send_file(uploader(url, within_s=0.45), url, artifact)


def test_the_total_ends_a_transfer_that_never_stops(artifact: Path) -> None:
    with Server() as server, pytest.raises(UploadError, match=r"time was up after \d+ of \d+ bytes") as caught:
        send_file(uploader(server.url, within_s=0.5, rate=200_000), server.url, artifact)
    assert caught.value.status is None


def test_a_server_that_comes_up_late_gets_it(artifact: Path) -> None:
    with Server(*[Answer(503)] * 8) as server:
        send_file(uploader(server.url), server.url, artifact)
        assert_whole(server.files()["weights.bin"], artifact)


def test_retry_after_is_waited_for(artifact: Path) -> None:
    with Server(Answer(429, headers={"Retry-After": "1"})) as server:
        started = time.monotonic()
        send_file(uploader(server.url), server.url, artifact)
        assert time.monotonic() - started >= 1.0
        assert len(server.received) == 1


def test_retry_after_never_waits_past_the_total(artifact: Path) -> None:
    with Server(*[Answer(503, headers={"Retry-After": "100"})] * 2) as server:
        with pytest.raises(UploadError, match="503"):
            send_file(uploader(server.url, within_s=5), server.url, artifact)
        assert len(server.requests) == 1


def test_both_forms_of_retry_after() -> None:
    assert retry_after_s(None) == 0
    assert retry_after_s(" 7 ") == 7
    assert retry_after_s("99999999999999999999") == 300
    assert retry_after_s("soon") == 0
    assert retry_after_s("-5") == 0
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert 50 < retry_after_s(format_datetime(later, usegmt=True)) <= 60
    assert retry_after_s(format_datetime(later - timedelta(days=1), usegmt=True)) == 0


def test_a_link_or_a_folder_is_no_body(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    for path in (tmp_path / "link", tmp_path, tmp_path / "absent"):
        with pytest.raises(UploadError):
            FileBody.at(path, "x")


def test_a_file_that_shrinks_is_final(artifact: Path) -> None:
    with Server() as server:
        sender = uploader(server.url)
        body = FileBody.at(artifact, "weights.bin")
        os.truncate(artifact, 1000)
        with pytest.raises(UploadError, match="became shorter"):
            sender.send("POST", server.url, body)
        sender.close()
        assert server.received == []


def test_the_throttle_holds_for_a_real_upload(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100_000))
    with Server() as server:
        started = time.monotonic()
        send_file(uploader(server.url, rate=100_000), server.url, tmp_path / "x", "x")
        assert time.monotonic() - started >= 0.85
        assert server.files()["x"].file_size == 100_000


def test_200_megabytes_in_constant_memory(tmp_path: Path) -> None:
    """Peak memory (VmHWM) of a process that sends 200 MB, compared with one that sends 1 MB."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flowmesh.messages.output import HttpDestination\n"
        "from flowmesh.results.throttle import Throttle\n"
        "from flowmesh.results.request_bodies import FileBody\n"
        "from flowmesh.results.upload import Uploader\n"
        "url, path = sys.argv[1], Path(sys.argv[2])\n"
        "sender = Uploader(HttpDestination(url=url), deadline=time.monotonic() + 100, throttle=Throttle(None))\n"
        "sender.send('POST', url, FileBody.at(path, path.name))\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
    )

    def peak_kib(path: Path) -> int:
        command = [sys.executable, "-c", code, server.url, str(path)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    block = os.urandom(1 << 20)
    (tmp_path / "small").write_bytes(block)
    with (tmp_path / "big").open("wb") as file:
        for index in range(200):
            file.write(block[index:] + block[:index])
    with Server() as server:
        small, big = peak_kib(tmp_path / "small"), peak_kib(tmp_path / "big")
        received = server.files()["big"]
    with (tmp_path / "big").open("rb") as file:
        assert received.file_sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    assert received.file_size == 200 << 20
    assert big - small < 8 * 1024
    assert big < 100 * 1024
