"""Pages and web search as the agents' tools get them, from a real server on loopback that answers as servers do."""

from __future__ import annotations

import gzip
import ipaddress
import json
from collections.abc import Iterator
from typing import Any

import pytest

from flowmesh.redaction import Redactor
from runners.agent.config import Fetch, SearchProvider
from runners.agent.documents import UnreadableDocument
from runners.agent.secrets import task_redactor
from runners.agent.tools import ToolRefused, _page_text
from runners.agent.web import WebRefused, check_provider, fetch, is_public, search
from runners.api import BadRequest
from tests.kit.fake_http import FakeHandler, FakeServer


class Site(FakeServer):
    def __init__(self) -> None:
        super().__init__(_Handler)
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.trickle_s = 0.0

    def url(self, path: str = "/") -> str:
        return f"{self.origin}{path}"


class _Handler(FakeHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.lower_headers(), self.body()))
        status, more, data = self.server.pages.get(self.path.partition("?")[0], (404, {}, b"nothing"))
        if not self.server.trickle_s:
            self.answer(status, data, more)
            return
        self.begin(status, {"Content-Length": str(len(data)), **more})
        for byte in data:
            self.wfile.write(bytes((byte,)))
            if self.server.over.wait(self.server.trickle_s):
                break

    do_POST = do_GET


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Site() as server:
        yield server


HERE = Fetch(allow_private=True, timeout_s=10, max_bytes=1000)


def test_pages_are_fetched(site) -> None:
    site.pages["/a"] = (200, {"Content-Type": "text/html"}, b"<p>hello")
    site.pages["/go"] = (302, {"Location": "/a"}, b"")
    site.pages["/big"] = (200, {}, b"x" * 1001)
    site.pages["/round"] = (301, {"Location": "/round"}, b"")
    page = fetch(site.url("/a?q=1"), HERE)
    assert (page.body, page.content_type) == (b"<p>hello", "text/html")
    assert site.asked[-1][1] == "/a?q=1"
    assert site.asked[-1][2]["host"] == f"127.0.0.1:{site.server_address[1]}"
    assert fetch(site.url("/go"), HERE).url == site.url("/a")
    for path, said in (("/big", "more than 1000 bytes"), ("/round", "redirects"), ("/absent", "answered 404")):
        with pytest.raises(WebRefused, match=said):
            fetch(site.url(path), HERE)


CAFE = "<p>Café</p>"
LATIN, UTF_16 = CAFE.encode("latin-1"), CAFE.encode("utf-16")
PAGES: dict[str, tuple[dict[str, str], bytes, str]] = {
    "gzip": ({"Content-Type": "text/html", "Content-Encoding": "gzip"}, gzip.compress(CAFE.encode()), "Café"),
    "meta": ({"Content-Type": "text/html"}, b"<meta charset='iso-8859-1'>" + LATIN, "Café"),
    "header": ({"Content-Type": "text/html; charset=ISO-8859-1"}, LATIN, "Café"),
    "xml": ({"Content-Type": "text/xml"}, b'<?xml version="1.0" encoding="latin-1"?>' + LATIN, CAFE),
    "mark": ({"Content-Type": "text/html"}, UTF_16, "Café"),
    "mark alone": ({}, UTF_16, CAFE),
    "no charset": ({"Content-Type": "text/html; charset=undefined"}, CAFE.encode(), "Café"),
    "drawing": ({"Content-Type": "image/svg+xml"}, b"<svg/>", "<svg/>"),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_read_in_its_encoding(name, site) -> None:
    headers, data, text = PAGES[name]
    site.pages["/page"] = (200, headers, data)
    assert _page_text(site.url("/page"), HERE).endswith(text)


UNREAD: dict[str, tuple[dict[str, str], bytes, str]] = {
    "coding": ({"Content-Encoding": "compress"}, b"<p>a", "an encoding that is not read here .compress"),
    "bomb": ({"Content-Encoding": "gzip"}, gzip.compress(bytes(10**6)), "more than 1000 bytes"),
    "damaged": ({"Content-Encoding": "gzip"}, b"<p>a", "cannot be reached"),
    "picture": ({"Content-Type": "image/png"}, b"\x89PNG\r\n", "format that cannot be read here .image/png"),
    "empty": ({"Content-Type": "text/html"}, b"", "has no text"),
    "script": (
        {"Content-Type": "text/html"},
        b"<body><script>app()</script>",
        "has no text .28 bytes.; perhaps a script",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_page_without_readable_text_is_refused(name, site) -> None:
    headers, data, said = UNREAD[name]
    site.pages["/page"] = (200, headers, data)
    with pytest.raises((ToolRefused, WebRefused, UnreadableDocument), match=said):
        _page_text(site.url("/page"), HERE)


def test_a_page_from_elsewhere_says_so(site) -> None:
    site.pages["/article"] = (302, {"Location": "/login"}, b"")
    site.pages["/login"] = (200, {"Content-Type": "text/html"}, b"<p>Your password?")
    assert _page_text(site.url("/article"), HERE) == f"[redirected to {site.url('/login')}]\nYour password?"


@pytest.mark.parametrize(
    "url",
    [
        "{site}", "http://localhost:{port}/", "http://[::1]:{port}/", "http://0.0.0.0:{port}/", "http://127.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/", "http://2130706433:{port}/", "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/", "http://192.168.1.1/", "file:///etc/passwd", "ftp://127.0.0.1/", "http://", "no address",
        "http://no-such-host.invalid/", "http://[bad/",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(url, site) -> None:
    with pytest.raises(WebRefused):
        fetch(url.format(site=site.url(), port=site.server_address[1]), Fetch(timeout_s=5))
    assert site.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07::1", True), ("::ffff:93.184.215.14", True),
        ("100.100.100.200", False), ("168.63.129.16", False), ("192.0.0.192", False), ("fd00:ec2::254", False),
        ("64:ff9b::169.254.169.254", False), ("2002:7f00:1::", False), ("::127.0.0.1", False), ("fe80::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:168.63.129.16", False), ("ff0e::1", False), ("224.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses_are_told_from_others(address, public) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


def test_a_page_that_trickles_does_not_hold_an_agent(site) -> None:
    site.pages["/slow"] = (200, {}, b"x" * 500)
    site.trickle_s = 0.1
    with pytest.raises(WebRefused, match="cannot be reached"):
        fetch(site.url("/slow"), Fetch(allow_private=True, timeout_s=0.5))


def test_only_allowed_hosts_are_asked(site) -> None:
    allowed = Fetch(allow_private=True, allow_hosts=("example.org",))
    for url in (site.url(), "http://notexample.org/", "http://example.org.evil.test/"):
        with pytest.raises(WebRefused, match="not in allow_hosts"):
            fetch(url, allowed)
    assert site.asked == []


def test_search_asks_as_configured(site, monkeypatch) -> None:
    monkeypatch.setenv("TEST_SEARCH_KEY", "search-key-123")
    found = {
        "web": {
            "hits": [{"t": "One", "u": "http://one", "d": {"s": "first  hit"}}, {"t": "Two", "u": "http://two"}, {}]
        }
    }
    site.pages["/search"] = (200, {}, json.dumps(found).encode())
    base: dict[str, Any] = {
        "url": site.url("/search"), "params": {"q": "{query}", "n": "{count}"}, "results": "web.hits", "title": "t",
        "link": "u", "snippet": "d.s", "api_key_env": "TEST_SEARCH_KEY", "api_key_header": "X-Key",
    }  # fmt: skip
    expected = [
        {"title": "One", "url": "http://one", "snippet": "first hit"},
        {"title": "Two", "url": "http://two", "snippet": ""},
    ]
    redact = task_redactor()
    assert search("a b&c", 2, SearchProvider(**base), redact, "p") == expected
    method, path, headers, _ = site.asked[-1]
    assert (method, path, headers["x-key"]) == ("GET", "/search?q=a+b%26c&n=2", "search-key-123")
    assert search("x", 2, SearchProvider(**base, method="POST"), redact, "p") == expected
    assert json.loads(site.asked[-1][3]) == {"q": "x", "n": 2}
    assert redact("the key search-key-123.") == "the key [hidden]."


def test_a_provider_that_fails_is_told_to_the_agent(site) -> None:
    site.pages["/s"] = (500, {}, b"")
    site.pages["/other"] = (200, {}, b'{"hits": 3}')
    site.pages["/quota"] = (200, {}, b'{"error": {"message": "quota exceeded"}, "results": []}')
    site.pages["/names"] = (200, {}, b'{"results": [{"name": "a", "url": null}]}')
    for path, said in (
        ("/s", "answered 500"),
        ("/other", "not what its configuration says"),
        ("/quota", "reported an error: quota exceeded"),
        ("/names", "none of 1 results has title, url or content"),
    ):
        provider = SearchProvider(url=site.url(path), params={"q": "{query}"})
        with pytest.raises(WebRefused, match=said):
            search("x", 3, provider, Redactor(), "p")
    with pytest.raises(BadRequest, match=r"one of them must contain \{query\}"):
        check_provider(SearchProvider(url=site.url(), params={"q": "x"}), "p")
    with pytest.raises(BadRequest, match=r"p.url: an http or https address"):
        check_provider(SearchProvider(url="search", params={"q": "{query}"}), "p")


def test_a_fetching_agent_reads_pages_and_searches(site, make_context, tmp_path) -> None:
    pytest.importorskip("smolagents", reason="needs the extra 'agent'")
    import yaml

    from tests.kit.agent_support import run_agent
    from tests.kit.openai_server import Say, Server, answer, call

    site.pages["/search"] = (
        200,
        {},
        json.dumps({"results": [{"title": "T", "url": site.url("/p"), "content": "c"}]}).encode(),
    )
    site.pages["/p"] = (200, {"Content-Type": "text/html"}, b"<h1>Moon</h1><p>384400 km away.</p>")
    site.pages["/d.csv"] = (200, {"Content-Type": "text/csv"}, b"a,b\n1,2\n")
    agents = tmp_path / "agents"
    agents.mkdir()
    provider = {"url": site.url("/search"), "params": {"q": "{query}"}}
    (agents / "search_providers.yaml").write_text(yaml.safe_dump({"ours": provider}))
    tools = {"fetch_page": {"allow_private": True}, "web_search": {"provider": "ours"}, "documents": True}
    steps = [
        call("web_search", query="moon distance"),
        Say(calls=(("fetch_page", {"url": site.url("/p")}), ("read_document", {"source": site.url("/d.csv")}))),
        call("fetch_page", url="http://no-such-host.invalid/"),
        answer("384400 km"),
    ]
    with Server(*steps).running() as server:
        ran = run_agent(make_context, agents, server.url, config={"tools": tools})
        assert site.url("/p") in server.requests[1].results[0]
        assert "384400 km away." in server.requests[2].results[1]
        assert "1,2" in server.requests[2].results[2]
        assert "no such host" in server.requests[3].results[-1]
    assert ran.output == "384400 km"
    assert "sandbox" not in ran.result["metadata"]
