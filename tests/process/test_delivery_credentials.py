"""Which server gets which credentials, across redirects; and no error shows one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh.results.request_bodies import BytesBody, UploadError
from tests.kit.http_server import Answer, Reset, Server
from tests.kit.upload import assert_whole, send_file, uploader

CUSTOM = {"Authorization": "Bearer custom-secret", "X-Api-Key": "k3y-secret", "content-TYPE": "text/evil"}


def headers_of(server: Server) -> dict[str, str]:
    return server.received[-1].headers


def test_custom_headers_go_with_every_request_but_content_type(artifact: Path) -> None:
    with Server() as server:
        sender = uploader(server.url, fields={"headers": {**CUSTOM, "user-agent": "mine"}})
        sender.send("PUT", server.url, BytesBody(b"{}", "application/json"))
        assert headers_of(server)["content-type"] == "application/json"
        assert headers_of(server)["authorization"] == "Bearer custom-secret"
        assert headers_of(server)["x-api-key"] == "k3y-secret"
        assert headers_of(server)["user-agent"] == "mine"
        send_file(sender, server.url, artifact)
        assert headers_of(server)["content-type"].startswith("multipart/form-data")
        assert headers_of(server)["x-api-key"] == "k3y-secret"
        assert [r.method for r in server.received] == ["PUT", "POST"]


def test_the_nodes_token_goes_to_the_orchestrator_only(artifact: Path) -> None:
    with Server() as orchestrator, Server() as other:
        options: dict[str, Any] = {"token": "n0de-token", "orchestrator_url": orchestrator.url + "/base"}
        send_file(uploader(orchestrator.url, **options), orchestrator.url, artifact)
        assert headers_of(orchestrator)["authorization"] == "Bearer n0de-token"
        send_file(uploader(other.url, **options), other.url, artifact)
        assert "authorization" not in headers_of(other)
        for spelling in ("localhost", "LOCALHOST"):  # loopback addresses lead to the same machine
            alias = orchestrator.url.replace("127.0.0.1", spelling)
            send_file(uploader(alias, **options), alias, artifact)
            assert headers_of(orchestrator)["authorization"] == "Bearer n0de-token"
        own = {"headers": {"authorization": "Bearer custom-secret"}}
        send_file(uploader(orchestrator.url, fields=own, **options), orchestrator.url, artifact)
        assert headers_of(orchestrator)["authorization"] == "Bearer custom-secret"
        send_file(uploader(other.url, token="n0de-token"), other.url, artifact)
        assert "authorization" not in headers_of(other)


def test_user_and_password_of_an_address_become_basic_and_netrc_is_not_asked(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login net password rc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Server() as server:
        send_file(uploader(server.url), server.url, artifact)
        assert "authorization" not in headers_of(server)
        url = server.url.replace("//", "//me:p%40ss@")
        send_file(uploader(url), url, artifact)
        assert headers_of(server)["authorization"] == "Basic bWU6cEBzcw=="


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_on_the_same_server_keeps_method_body_and_headers(artifact: Path, status: int) -> None:
    with Server(Answer(status, headers={"Location": "/there?x=1"})) as server:
        send_file(uploader(server.url, fields={"headers": CUSTOM}), server.url, artifact)
        (received,) = server.received
    assert (received.method, received.path) == ("POST", "/there?x=1")
    assert received.headers["authorization"] == "Bearer custom-secret"
    assert_whole(received, artifact)


@pytest.mark.parametrize("early", [False, True])
def test_a_redirect_to_another_server_takes_no_secret_along(artifact: Path, early: bool) -> None:
    with Server() as other:
        redirect = Answer(307, headers={"Location": other.url + "/x"}, early=early)
        with Server(redirect) as server:
            options: dict[str, Any] = {"token": "n0de-token", "orchestrator_url": other.url}
            send_file(uploader(server.url, fields={"headers": CUSTOM}, **options), server.url, artifact)
            assert server.received == []
        (received,) = other.received
    assert_whole(received, artifact)
    assert not {"authorization", "x-api-key", "cookie"} & set(received.headers)
    assert "secret" not in str(received.headers)
    assert "n0de-token" not in str(received.headers)


def test_secrets_do_not_come_back_on_a_redirect_that_returns(artifact: Path) -> None:
    with Server() as first, Server() as second:
        first.plan.append(Answer(307, headers={"Location": second.url}))
        second.plan.append(Answer(307, headers={"Location": first.url + "/back"}))
        send_file(uploader(first.url, fields={"headers": CUSTOM}), first.url, artifact)
        assert first.received[0].path == "/back"
        assert "authorization" not in first.received[0].headers


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(302, headers={"Location": "/x"}), "302.*only 307 and 308"),
        (Answer(303, headers={"Location": "/x"}), "303.*only 307 and 308"),
        (Answer(307), "without a Location"),
        (Answer(307, headers={"Location": "file:///etc/passwd"}), "must be http or https"),
        (Answer(307, headers={"Location": "http://h:bad/"}), "bad address"),
    ],
)
def test_other_redirects_are_final(artifact: Path, answer: Answer, told: str) -> None:
    with Server(answer) as server:
        with pytest.raises(UploadError, match=told):
            send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == 1


def test_a_circle_of_redirects_ends(artifact: Path) -> None:
    with Server(*[Answer(307, headers={"Location": "/x"})] * 20) as server:
        with pytest.raises(UploadError, match="more than 5 redirects"):
            send_file(uploader(server.url), server.url, artifact)
        assert len(server.requests) == 6


def test_no_error_shows_a_secret(artifact: Path) -> None:
    echo = b"got Bearer custom-secret and k3y-secret, s1gn4ture, hunter22, n0de-token"
    for answer in (Answer(403, echo), Answer(403, b"y" * 195 + b"k3y-secret"), Reset(10)):
        with Server(answer, *[Reset(10)] * 100) as server:
            url = server.url.replace("//", "//me:hunter22@") + "/r?sig=s1gn4ture"
            options: dict[str, Any] = {"token": "n0de-token", "orchestrator_url": server.url}
            with pytest.raises(UploadError) as caught:
                send_file(uploader(url, within_s=0.3, fields={"headers": CUSTOM}, **options), url, artifact)
        for secret in ("custom-secret", "k3y-s", "s1gn4ture", "hunter22", "n0de-token"):
            assert secret not in str(caught.value)
        assert caught.value.__cause__ is None
        assert f"127.0.0.1:{server.port}/r/t-1/files" in str(caught.value)


def test_a_redirect_to_another_spelling_of_the_orchestrator_keeps_the_token_only(artifact: Path) -> None:
    with Server() as orchestrator:
        alias = orchestrator.url.replace("127.0.0.1", "localhost")
        options: dict[str, Any] = {"token": "n0de-token", "orchestrator_url": orchestrator.url}
        orchestrator.plan = [Answer(307, headers={"Location": f"{alias}/r"})]
        own = {"headers": {"X-Api-Key": "k3y-secret"}}
        send_file(uploader(orchestrator.url, fields=own, **options), orchestrator.url, artifact)
        assert headers_of(orchestrator)["host"].startswith("localhost:")
        assert headers_of(orchestrator)["authorization"] == "Bearer n0de-token"
        assert "x-api-key" not in headers_of(orchestrator)
