"""Downloads: where they may lead, and what a redirect takes along."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.job import Permits
from runners.api import BadRequest, Context
from runners.data.addresses import is_allowed, is_local
from runners.data.download import fetch
from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.paths import ROOT

MakeContext = Callable[..., Context]
BODY = b"the file"


class Server(FakeServer):
    def __init__(self) -> None:
        super().__init__(Handler)
        self.targets: dict[str, tuple[int, str]] = {}
        """Path → status and Location."""
        self.seen: list[tuple[str, dict[str, str]]] = []


class Handler(FakeHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.lower_headers()))
        status, target = self.server.targets.get(self.path, (200, ""))
        self.send_response(status)
        if target:
            self.send_header("Location", target)
        body = b"" if target else BODY
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    with Server() as one, Server() as other:
        yield one, other


def get(make_context: MakeContext, url: str, permits: Permits | None = None, **more: Any) -> bytes:
    fields = {} if permits is None else {"permits": permits}
    return fetch(make_context({}, **fields), url, "spec.data.url", **more).path.read_bytes()


def refused(make_context: MakeContext, url: str, permits: Permits | None = None, **more: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        get(make_context, url, permits or Permits(), **more)
    return str(caught.value)


def spellings(port: int) -> list[str]:
    hosts = ["127.0.0.1", "127.8.9.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "0.0.0.0", "localhost",
             "[::1]", "[::]", "[::ffff:127.0.0.1]", "LOCALHOST", "[::127.0.0.1]"]  # fmt: skip
    return [f"http://{host}:{port}/x" for host in hosts]


def test_loopback_is_refused_however_it_is_spelled(make_context: MakeContext, servers: tuple[Server, Server]) -> None:
    for url in (*spellings(servers[0].port), "http://169.254.169.254/latest/meta-data", "http://[fe80::1]/x"):
        assert "tasks.local_hosts" in refused(make_context, url), url
    assert servers[0].seen == []


def test_the_operator_and_the_orchestrators_origin_open_it(
    make_context: MakeContext, servers: tuple[Server, Server]
) -> None:
    one, other = servers
    assert get(make_context, f"{one.origin}/a", Permits(local_hosts=(f"127.0.0.1:{one.port}",))) == BODY
    assert get(make_context, f"{one.origin}/b", Permits(orchestrator_url=f"{one.origin}/")) == BODY
    permits = Permits(local_hosts=(f"127.0.0.1:{one.port}",), orchestrator_url=one.origin)
    assert "tasks.local_hosts" in refused(make_context, f"{other.origin}/c", permits)


def test_a_redirect_to_a_local_address_is_refused(make_context: MakeContext, servers: tuple[Server, Server]) -> None:
    one, other = servers
    one.targets["/x"] = 302, f"{other.origin}/secret"
    permits = Permits(local_hosts=(f"127.0.0.1:{one.port}",))
    assert "tasks.local_hosts" in refused(make_context, f"{one.origin}/x", permits)
    one.targets["/y"] = 302, "file:///etc/passwd"
    assert "not an http" in refused(make_context, f"{one.origin}/y", permits)
    one.targets["/z"] = 302, "/z"
    assert "redirects" in refused(make_context, f"{one.origin}/z", permits)
    assert other.seen == []


def test_a_name_that_changes_its_address_meanwhile_gets_nothing(
    make_context: MakeContext, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answers = socket.getaddrinfo, iter(["192.0.2.1"])

    def rebinding(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        return real(next(answers, "127.0.0.1") if host == "rebind.example" else host, port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert "local address" in refused(make_context, f"http://rebind.example:{servers[0].port}/x")
    assert servers[0].seen == []


def test_custom_headers_and_a_login_stay_with_their_origin(
    make_context: MakeContext, servers: tuple[Server, Server]
) -> None:
    one, other = servers
    one.targets |= {"/here": (302, "/again"), "/again": (307, f"{other.origin}/there")}
    other.targets["/there"] = 302, f"{one.origin}/back"
    headers = {"X-Api-Key": "k-123", "Authorization": "Bearer t-123"}
    assert get(make_context, f"{one.origin}/here", headers=headers) == BODY
    found = {path: "x-api-key" in sent and "authorization" in sent for path, sent in one.seen}
    assert found == {"/here": True, "/again": True, "/back": False}  # another server chose the way back
    assert not {"x-api-key", "authorization"} & set(other.seen[0][1])
    one.seen.clear()
    other.seen.clear()
    assert get(make_context, f"{one.origin.replace('//', '//user:pw@')}/here") == BODY
    assert ["authorization" in sent for _, sent in (*one.seen, *other.seen)] == [True, True, False, False]
    one.targets["/self"] = 302, f"http://localhost:{one.port}/other-name"
    get(make_context, f"{one.origin}/self", headers=headers)
    assert "x-api-key" not in one.seen[-1][1]


def test_a_netrc_is_not_read_and_a_proxy_is_used(
    make_context: MakeContext, servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, proxy = servers
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\ndefault login me password s3cret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    get(make_context, f"{one.origin}/x")
    assert "authorization" not in one.seen[0][1]
    monkeypatch.setenv("http_proxy", proxy.origin)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get(make_context, "http://data.example/file", Permits()) == BODY  # the proxy itself may be a local one
    assert proxy.seen[0][0] == "http://data.example/file"


@pytest.mark.parametrize(
    "name",
    ["Host", "host", "Content-Length", "Transfer-Encoding", "Connection", "TE", "Upgrade", "Proxy-Authorization"],
)
def test_headers_of_the_connection_are_not_the_documents(make_context: MakeContext, name: str) -> None:
    assert "belongs to the connection" in refused(make_context, "http://h.example/", headers={name: "x"})


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True), ("0.1.2.3", True), ("169.254.169.254", True), ("168.63.129.16", True),
        ("100.100.100.200", True), ("::1", True), ("::", True), ("fe80::5", True), ("fd00:ec2::254", True),
        ("::ffff:169.254.169.254", True), ("64:ff9b::7f00:1", True), ("2002:7f00:1::", True),
        ("10.0.0.5", False), ("192.168.1.1", False), ("93.184.216.34", False), ("2606:4700::1", False),
        ("64:ff9b::5db8:d822", False),
    ],
)  # fmt: skip
def test_which_addresses_are_local(address: str, local: bool) -> None:
    assert is_local(ipaddress.ip_address(address)) is local


def test_patterns_of_local_hosts() -> None:
    permits = Permits(local_hosts=("127.0.0.1:8000", "[::1]:9000", "*.internal"))
    allowed = ("http://127.0.0.1:8000/x", "http://[::1]:9000/", "https://a.internal/")
    assert all(is_allowed(permits, url) for url in allowed)
    assert not any(is_allowed(permits, url) for url in ("http://127.0.0.1:80/", "http://[::1]/", "http://internal/"))


def test_no_client_of_a_task_reads_a_netrc() -> None:
    """Sessions come from `flowmesh.web.session`, or say it themselves: `requests` logs in with ~/.netrc by itself."""
    calls = re.compile(r"\brequests\.(get|post|put|patch|head|delete|request|Session)\(")
    texts = {path: path.read_text() for folder in ("flowmesh", "runners") for path in (ROOT / folder).rglob("*.py")}
    found = [path for path, text in texts.items() if calls.search(text)]
    assert found
    assert [path for path in found if "trust_env = False" not in texts[path]] == []
