"""One request to a webhook: its signature, its key, and what each answer means."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.errors import ConfigError
from flowmesh.reporting.webhook_request import read_key, send, signature
from tests.kit.http_server import Answer, Reset, Server, Stall, Step

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_a_signature_is_that_of_standard_webhooks() -> None:
    """The value was computed with the package standardwebhooks 1.1.0."""
    found = signature(KEY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found == "v1,hK4CWvngkaAwjY1pABLuUbOIkEJjW9tAapq1no4ojG0="


@pytest.mark.parametrize("text", [f"whsec_{base64.b64encode(KEY).decode()}", KEY.decode()])
def test_a_key_is_base64_after_its_prefix_and_text_otherwise(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(f" {text}\n")
    assert read_key(str(tmp_path / "secret")) == KEY


@pytest.mark.parametrize("text", ["", "short", "whsec_!!!", "whsec_AAAA"])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match=r"notify\.secret_file") as refused:
        read_key(str(tmp_path / "secret"))
    assert not text or text.removeprefix("whsec_") not in str(refused.value)


@pytest.mark.parametrize(
    ("step", "error", "refused", "retry_after_s"),
    [
        (Answer(204, b""), "", False, 0),
        (Answer(400, b"bad"), "answered 400 Bad Request: bad", True, 0),
        (Answer(410, b""), "answered 410 Gone", True, 0),
        (Answer(429, b"", {"Retry-After": "17"}), "answered 429 Too Many Requests", False, 17),
        (Answer(503, b"", {"Retry-After": "99999"}), "answered 503 Service Unavailable", False, 300),
        (Answer(302, b"", {"Location": "http://127.0.0.1:1/"}), "a redirect, which is not followed", False, 0),
        (Reset(), "connection", False, 0),
        (Stall(), "no answer within 0.2 s", False, 0),
    ],
)
def test_what_an_answer_means(server: Server, step: Step, error: str, refused: bool, retry_after_s: float) -> None:
    server.plan.append(step)
    found = send(f"{server.url}/hook", "id-1", b"{}", secret_file=None, timeout_s=0.2)
    assert error.lower() in found.error.lower()
    assert bool(found.error) == bool(error)
    assert (found.refused, found.retry_after_s) == (refused, retry_after_s)


def test_a_request_carries_id_time_signature_and_login(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(KEY)
    url = server.url.replace("//", "//user:pass@")
    assert not send(url, "id-2", b'{"a":1}', secret_file=str(tmp_path / "secret"), timeout_s=5).error
    headers = server.received[-1].headers
    signed = f"id-2.{headers['webhook-timestamp']}.".encode() + b'{"a":1}'
    assert headers["webhook-id"] == "id-2"
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["authorization"] == f"Basic {base64.b64encode(b'user:pass').decode()}"


def test_without_its_key_nothing_is_sent(server: Server, tmp_path: Path) -> None:
    before = len(server.requests)
    found = send(server.url, "id-3", b"{}", secret_file=str(tmp_path / "none"), timeout_s=5)
    assert "cannot be read" in found.error
    assert not found.refused
    assert len(server.requests) == before
