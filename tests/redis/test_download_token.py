"""The node's token goes with downloads from the orchestrator's origin, and no task sees it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.support import Node, Orchestrator, alive, until
from tests.process.test_delivery_trust import make_certificates

pytestmark = pytest.mark.redis
TOKEN = "n0de-t0ken-for-downloads"
CONFIG = """
[tasks]
local_hosts = ["*"]

[task_types.download]
runner = "tests.kit.download_runners:DownloadRunner"
environment = "light"
"""


OTHER_CAS = {"REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": "", "SSL_CERT_DIR": ""}
OF_NOBODY = """
[processes]
task_user = "nobody"

[environments.light]
preload = ["requests", "ssl", "tests.kit.download_runners"]
"""
"""That user may not be able to read this interpreter's folder."""


class Files(FakeServer):
    """Serves /NAME as text NAME to who has `wanted`, /cut breaking off once, and /to?URL as a redirect."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.wanted: str | None = f"Bearer {TOKEN}"
        self.seen: list[tuple[str, str | None]] = []
        """(path, Authorization) of each request."""
        self.cuts = 1


class _Handler(FakeHandler):
    server: Files

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.server.seen.append((self.path, given))
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.answer(302, b"", {"Location": query})
        elif self.server.wanted is not None and given != self.server.wanted:
            self.answer(401, b"no")
        elif path == "/cut" and self.server.cuts:
            self.server.cuts -= 1
            self.begin(200, {"Content-Length": "3", "ETag": '"1"'})
            self.wfile.write(b"c")
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif path == "/cut" and self.headers.get("Range") == "bytes=1-":
            self.answer(206, b"ut", {"Content-Range": "bytes 1-2/3", "ETag": '"1"'})
        elif path == "/chunked":
            self.begin(200, {"Transfer-Encoding": "chunked"})
            self.wfile.write(b"4\r\nchun\r\n3\r\nked\r\n0\r\n\r\n")
        else:
            self.answer(200, path[1:].encode())


@pytest.fixture
def files() -> Iterator[Files]:
    with Files() as server:
        yield server


@pytest.fixture
def other() -> Iterator[Files]:
    with Files() as server:
        yield server


def download(orchestrator: Orchestrator, node: Node, urls: dict[str, Any], **more: Any) -> dict[str, Any]:
    asked = {name: url if isinstance(url, dict) else {"url": url} for name, url in urls.items()}
    end = orchestrator.run("w1", {"taskType": "download", "urls": asked, "nekot": TOKEN[::-1], **more})
    assert end["type"] == "TASK_SUCCEEDED", end
    result = node.result(end["task_id"])
    assert result["sees_token"] is False
    return dict(result["found"])


def open_files(pid: int) -> list[str]:
    """What a process has open, as far as it does not close it meanwhile."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(str(Path(f"/proc/{pid}/fd/{name}").readlink()))
    return found


def gateways(node: Node) -> list[int]:
    """Pids of the node's gateway."""
    servers = [each["pid"] for each in node.ask(op="status")["servers"] if each["environment"] == "delivery"]
    found = []
    for server in servers:
        for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            if any(name.endswith("gateway.log") for name in open_files(pid)):
                found.append(int(pid))
    return found


def test_the_token_goes_to_the_orchestrator_and_nowhere_else(
    orchestrator: Orchestrator, make_node, files: Files, other: Files
) -> None:
    node = make_node(config=CONFIG, env={"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": files.origin})
    alias = files.origin.replace("127.0.0.1", "localhost")
    found = download(
        orchestrator,
        node,
        {
            "whole": f"{files.origin}/whole",
            "alias": f"{alias}/alias?with=query",
            "cut": f"{files.origin}/cut",
            "chunked": f"{files.origin}/chunked",
            "inside": f"{files.origin}/to?{alias}/inside",
            "own": {"url": f"{files.origin}/own", "headers": {"authorization": "Bearer own"}},
            "stranger": f"{other.origin}/stranger",
            "out": f"{files.origin}/to?{other.origin}/out",
            "back": f"{other.origin}/to?{files.origin}/back",
            "headers": {"url": f"{files.origin}/to?{other.origin}/headers", "headers": {"X-Key": "k", "Cookie": "c"}},
        },
    )
    for name in ("whole", "alias", "cut", "chunked", "inside"):
        assert found[name] == {"text": name}
    assert "own Authorization header was sent" in found["own"]["error"]
    assert f"it is for {files.origin} (delivery.orchestrator_url) only" in found["stranger"]["error"]
    for name in ("out", "back", "headers"):
        assert "a redirect led to another origin" in found[name]["error"]
    assert {found[name]["fault"] for name in ("own", "stranger", "out", "back")} == {"bad_request"}
    assert {given for _, given in other.seen} == {None}
    assert [given for path, given in files.seen if path == "/back"] == [None]
    pids = until(lambda: gateways(node), "the gateway runs")
    assert node.stop() == 0
    assert not any(map(alive, pids))


def test_errors_say_why_there_is_no_token(orchestrator: Orchestrator, make_node, files: Files) -> None:
    node = make_node(config=CONFIG, env={"ORCHESTRATOR_BASE_URL": files.origin})
    found = download(orchestrator, node, {"none": f"{files.origin}/none"})
    assert "this node has no token for the orchestrator" in found["none"]["error"]
    assert gateways(node) == []


def test_a_gateway_that_dies_and_a_token_that_changes(
    orchestrator: Orchestrator, make_node, files: Files, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("an-older-one")
    lines = f'\n[delivery]\norchestrator_url = "{files.origin}"\norchestrator_token_file = "{token}"\n'
    node = make_node(config=CONFIG + lines)
    urls = {"late": {"url": f"{files.origin}/late"}, "later": {"url": f"{files.origin}/later"}}
    spec = {"taskType": "download", "urls": urls, "nekot": TOKEN[::-1], "wait": str(tmp_path / "go")}
    task = orchestrator.dispatch("w1", spec)
    until((node.results_dir / task / "waiting").exists, "it waits")
    (pid,) = until(lambda: gateways(node), "the gateway runs")
    os.kill(pid, signal.SIGKILL)
    (pid,) = until(lambda: [each for each in gateways(node) if each != pid], "another gateway runs")
    node.kill()
    node.start()
    until(lambda: gateways(node) not in ([], [pid]), "the next supervisor has its own")
    (tmp_path / "go").touch()
    until(lambda: files.seen, "it asks with the older token")
    token.write_text(TOKEN)
    assert orchestrator.wait_end(task)["type"] == "TASK_SUCCEEDED"
    assert node.result(task)["found"] == {"late": {"text": "late"}, "later": {"text": "later"}}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_task_of_another_user_reaches_the_gateway_and_not_its_token(
    orchestrator: Orchestrator, make_node, files: Files
) -> None:
    env = {"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": files.origin}
    node = make_node(start=False, config=CONFIG + OF_NOBODY, env=env)
    node.home.chmod(0o755)
    node.start()
    assert download(orchestrator, node, {"a": f"{files.origin}/a"}) == {"a": {"text": "a"}}
    assert files.seen == [("/a", f"Bearer {TOKEN}")]


def test_a_stranger_gets_nothing_from_the_gateway(orchestrator: Orchestrator, make_node, files: Files) -> None:
    import socket

    node = make_node(config=CONFIG, env={"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": files.origin})
    download(orchestrator, node, {"a": f"{files.origin}/a"})
    before = len(files.seen)
    for head in (b"GET /b HTTP/1.1", b"GET /b HTTP/1.1\r\nX-FlowMesh-Key: no", b"POST /b HTTP/1.1"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(node.state_dir / "gateway" / "socket"))
            sock.sendall(head + b"\r\n\r\n")
            assert sock.recv(100).split()[1] in (b"403", b"501")
    assert len(files.seen) == before


def test_certificates_hold_for_downloads_with_and_without_the_token(
    orchestrator: Orchestrator, make_node, tmp_path: Path
) -> None:
    import ssl

    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with Files() as files, Files() as plain:
        for server in (files, plain):
            server.socket = context.wrap_socket(server.socket, server_side=True)
        plain.wanted = None
        urls = {"token": f"https://127.0.0.1:{files.port}/token", "plain": f"https://127.0.0.1:{plain.port}/plain"}
        env = {"ORCHESTRATOR_TOKEN": TOKEN, "ORCHESTRATOR_BASE_URL": f"https://127.0.0.1:{files.port}"}
        node = make_node(config=CONFIG, env={**env, "SSL_CERT_FILE": str(tmp_path / "ca.pem"), **OTHER_CAS})
        found = download(orchestrator, node, urls)
        assert found == {"token": {"text": "token"}, "plain": {"text": "plain"}}
        del node.env["SSL_CERT_FILE"]
        node.stop()
        node.env |= {"SSL_CERT_FILE": "/dev/null"}
        node.start()
        before = files.seen + plain.seen
        found = download(orchestrator, node, urls)
        for name in ("token", "plain"):
            assert "its certificate is not trusted" in found[name]["error"]
            assert "set SSL_CERT_FILE" in found[name]["error"]
        assert files.seen + plain.seen == before
