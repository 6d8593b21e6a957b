"""Agents' clients over TLS: which authorities they trust, against a server on loopback."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("smolagents", reason="needs the extra 'agent'")

from flowmesh.redaction import Redactor
from flowmesh.web.session import TRUST_VARIABLES
from runners.agent import tls
from runners.agent.config import Fetch, SearchProvider
from runners.agent.web import WebRefused, fetch, search
from runners.api import RunnerError
from tests.kit.agent_support import run_agent
from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.openai_server import Server, answer


class Page(FakeHandler):
    def do_GET(self) -> None:
        body = b'{"results": [{"title": "t", "url": "u", "content": "c"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that is its own authority, in a file with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to create a certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "folder").mkdir()
    shutil.copy(folder / "cert.pem", folder / "folder")
    subprocess.run(["openssl", "rehash", folder / "folder"], check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TRUST_VARIABLES, "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def over_tls(server: FakeServer, certificate: Path) -> FakeServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # a client that refuses the certificate
    return server


@pytest.fixture
def page(certificate: Path) -> Iterator[str]:
    with over_tls(FakeServer(Page), certificate) as server:
        yield f"127.0.0.1:{server.port}"


NAMES = [*TRUST_VARIABLES, "REQUESTS_CA_BUNDLE as a folder"]


@pytest.fixture(params=NAMES)
def trusting(request: pytest.FixtureRequest, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.param
    is_folder = name == "SSL_CERT_DIR" or name.endswith("folder")
    monkeypatch.setenv(name.split()[0], str(certificate.with_name("folder") if is_folder else certificate))


def look_up(host: str) -> list[dict[str, str]]:
    provider = SearchProvider(url=f"https://{host}/s", params={"q": "{query}"})
    return search("x", 3, provider, Redactor(), "provider")


def test_clients_trust_what_the_variable_names(trusting, certificate, page, tmp_path, make_context) -> None:
    assert b"results" in fetch(f"https://{page}/", Fetch(allow_private=True)).body
    assert look_up(page) == [{"title": "t", "url": "u", "snippet": "c"}]
    with over_tls(Server(answer("done")), certificate) as server:
        url = server.url.replace("http://", "https://")
        assert run_agent(make_context, tmp_path / "agents", url).output == "done"


def test_nobody_else_is_trusted(page, certificate, tmp_path, make_context) -> None:
    with pytest.raises(WebRefused, match=r"certificate that is not trusted .*self-signed"):
        fetch(f"https://{page}/", Fetch(allow_private=True))
    with pytest.raises(WebRefused, match="search provider has a certificate that is not trusted"):
        look_up(page)
    with over_tls(Server(answer("done")), certificate) as server, pytest.raises(RunnerError) as refused:
        run_agent(make_context, tmp_path / "agents", server.url.replace("http://", "https://"))
    assert "certificate that is not trusted (self-signed certificate); see SSL_CERT_FILE" in str(refused.value)


def test_the_name_is_checked(certificate, page, monkeypatch) -> None:
    """Also where a page's address was resolved before, so that the connection goes to a number."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(WebRefused, match=r"certificate that is not trusted \(.*mismatch"):
        fetch(f"https://localhost:{page.rpartition(':')[2]}/", Fetch(allow_private=True))


def test_a_bundle_that_is_not_there_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "absent"))
    with pytest.raises(RunnerError, match=r"REQUESTS_CA_BUNDLE is .*absent', which does not exist"):
        tls.context()
    (tmp_path / "absent").write_text("no certificate")
    with pytest.raises(RunnerError, match="holds no certificates"):
        tls.context()
