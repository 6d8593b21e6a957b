"""Certificates of a CA that the test makes, and names that nobody knows."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.results import http_attempt
from flowmesh.results.request_bodies import BytesBody, Patience, UploadError
from flowmesh.web import session
from tests.kit.http_server import Answer, Server
from tests.kit.upload import uploader

BODY = BytesBody(b"{}", "application/json")


class TlsServer(Server):
    """A server with a certificate of its own CA, `ca.pem` in its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.ca = folder / "ca.pem"
        if not self.ca.exists():
            make_certificates(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


def make_certificates(folder: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to create certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    key = ("-newkey", "rsa:2048", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # Python 3.13 requires it
    openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=test CA", *usage, "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", *key, "-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-out", "server.pem")
    hashed = folder / "hashed"
    hashed.mkdir()
    shutil.copy(folder / "ca.pem", hashed / "ca.pem")
    openssl("rehash", "hashed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ca")


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TlsServer]:
    for name in session.TRUST_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with TlsServer(folder) as running:
        yield running


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSL_CERT_FILE", "ca.pem"),
        ("SSL_CERT_DIR", "hashed"),
        ("REQUESTS_CA_BUNDLE", "ca.pem"),
        ("CURL_CA_BUNDLE", "ca.pem"),
    ],
)
def test_certificates_that_the_environment_names_are_trusted(
    server: TlsServer, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, str(folder / value))
    uploader(server.url).send("POST", server.url, BODY)
    assert len(server.received) == 1


def test_both_variables_of_openssl_hold_together(
    server: TlsServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "server.csr"))  # no certificate in it
    monkeypatch.setenv("SSL_CERT_DIR", str(folder / "hashed"))
    uploader(server.url).send("POST", server.url, BODY)
    assert len(server.received) == 1


def test_a_certificate_that_is_not_trusted_is_final_and_the_error_names_the_remedy(server: TlsServer) -> None:
    with pytest.raises(UploadError, match=r"unable to get local issuer.*package requests; set SSL_CERT_FILE"):
        uploader(server.url, within_s=300).send("POST", server.url, BODY)
    assert server.received == []


def test_the_error_says_that_the_variable_names_nothing(server: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/not/there.pem")
    with pytest.raises(UploadError, match=r"SSL_CERT_FILE=/not/there.pem \(SSL_CERT_FILE names nothing that exists\)"):
        uploader(server.url, within_s=300).send("POST", server.url, BODY)


def test_a_name_that_does_not_resolve_is_given_up_sooner_than_a_server_that_answers_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_attempt, "_UNRESOLVED", Patience("unresolved", 0.2))
    with pytest.raises(UploadError, match=r"gave up after \d+ s and \d+ attempts"):
        uploader("http://no-such-host.invalid", within_s=3600).send("POST", "http://no-such-host.invalid/r", BODY)
    with Server(*[Answer(503)] * 20) as busy:  # many more attempts than the other one had
        uploader(busy.url, within_s=3600, max_backoff_s=0.02).send("POST", busy.url, BODY)
        assert len(busy.received) == 1


def test_a_refusal_says_why_the_token_was_not_sent() -> None:
    with Server() as orchestrator, Server() as other:
        options = {"token": "n0de-token", "orchestrator_url": orchestrator.url}
        cases = [
            (other, {}, options, f"it is for {orchestrator.url} "),
            (orchestrator, {"headers": {"authorization": "Bearer own-secret"}}, options, "own Authorization header"),
            (orchestrator, {}, {"orchestrator_url": orchestrator.url}, "this node has no token"),
            (orchestrator, {}, {"token": "n0de-token"}, "delivery.orchestrator_url does not say"),
        ]
        for server, fields, given, why in cases:
            for status in (401, 403):
                server.plan = [Answer(status)]
                with pytest.raises(UploadError, match=why):
                    uploader(server.url, fields=fields, **given).send("POST", server.url, BODY)
        orchestrator.plan = [Answer(403)]
        with pytest.raises(UploadError, match=r"403 Forbidden: {}$"):  # it knows the token, and does not permit this
            uploader(orchestrator.url, **options).send("POST", orchestrator.url, BODY)
        orchestrator.plan = [Answer(307, headers={"Location": f"{other.url}/r"})]
        other.plan = [Answer(401)]
        with pytest.raises(UploadError, match="a redirect led to another origin"):
            uploader(orchestrator.url, **options).send("POST", orchestrator.url, BODY)
        assert all("authorization" not in r.headers for r in other.received)
