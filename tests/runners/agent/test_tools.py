"""The agents' tools one by one: files, documents, pages, search; and the helpers that read what models write."""

from __future__ import annotations

import io
import ipaddress
import json
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.redaction import Redactor
from runners.agent.command import Bounds, NotConfined
from runners.agent.config import Fetch, SearchProvider, Tools
from runners.agent.documents import UnreadableDocument, document_text
from runners.agent.html_text import html_text
from runners.agent.sandbox import Sandbox
from runners.agent.secrets import task_redactor
from runners.agent.tools import Kit, build_tools
from runners.agent.watch import Watch
from runners.agent.web import WebRefused, check_provider, fetch, is_public, search
from runners.agent.workspace import PathRefused, Workspace
from runners.api import BadRequest
from tests.kit.fake_http import FakeHandler, FakeServer


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    (tmp_path / "secret").write_text("secret")
    return Workspace(tmp_path / "work")


def test_files_are_written_and_read(space) -> None:
    space.write("a/b/c.txt", b"one")
    space.write("a/b/c.txt", b"2")
    assert space.read("a/b/c.txt") == b"2"
    assert space.read(f"{space.folder}/a/b/c.txt") == b"2"
    assert space.read("./a/./b/c.txt") == b"2"
    assert space.listing() == ["a/b/c.txt (1 bytes)"]


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "/", "x\0y", "//etc/passwd"])
def test_paths_stay_inside(path, space) -> None:
    with pytest.raises(PathRefused):
        space.read(path)
    with pytest.raises(PathRefused):
        space.write(path, b"x")


def test_links_are_not_followed(space, tmp_path) -> None:
    (space.folder / "file").symlink_to(tmp_path / "secret")
    (space.folder / "folder").symlink_to(tmp_path)
    (space.folder / "inner").symlink_to("file2")
    for path in ("file", "folder/secret", "inner"):
        with pytest.raises(PathRefused, match="link"):
            space.read(path)
        with pytest.raises(PathRefused, match="link"):
            space.write(path, b"x")
    with pytest.raises(PathRefused, match="link"):
        space.write("folder/new/deep", b"x")
    assert (tmp_path / "secret").read_text() == "secret"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["secret", "work"]


def test_what_is_no_file_is_refused(space) -> None:
    os.mkfifo(space.folder / "pipe")
    (space.folder / "dir").mkdir()
    for path in ("pipe", "dir"):
        with pytest.raises(PathRefused):
            space.read(path)
    with pytest.raises(PathRefused):
        space.write("pipe", b"x")
    space.write("big", b"x" * 100)
    with pytest.raises(PathRefused, match="at most 50"):
        space.read("big", 50)
    with pytest.raises(PathRefused, match="no such file"):
        space.read("absent")


def test_what_remains_can_be_packed(space, tmp_path) -> None:
    space.write("good", b"x")
    (space.folder / "out").symlink_to(tmp_path / "secret")
    (space.folder / "absolute").symlink_to(space.folder / "good")
    (space.folder / "stays").symlink_to("good")
    (space.folder / "loop").symlink_to("loop")
    os.mkfifo(space.folder / "pipe")
    (space.folder / ".tmp").mkdir()
    assert sorted(space.tidy()) == ["absolute", "loop", "out", "pipe"]
    assert sorted(each.name for each in space.folder.iterdir()) == ["good", "stays"]
    assert (tmp_path / "secret").read_text() == "secret"
    empty = Workspace(tmp_path / "empty")
    assert empty.tidy() == []
    assert not empty.folder.exists()


def test_what_a_command_closed_is_opened_and_too_deep_folders_go(space) -> None:
    (space.folder / "closed").mkdir()
    (space.folder / "closed" / "x").write_text("x")
    (space.folder / "closed").chmod(0o600)
    (space.folder / os.fsdecode(b"\xff")).write_text("x")
    os.mkfifo(space.folder / os.fsdecode(b"p\xfe"))
    dropped = space.tidy()
    assert Redactor().deep(dropped) == ["p\ufffd"]
    assert (space.folder / "closed").stat().st_mode & 0o777 == 0o755


def docx(body: str) -> bytes:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as pack:
        pack.writestr("word/document.xml", f"<w:document {space}><w:body>{body}</w:body></w:document>")
    return packed.getvalue()


def test_documents_become_text() -> None:
    assert document_text("Größe".encode(), "a.md") == "Größe"
    assert document_text("Größe".encode("latin-1"), "x", "text/plain; charset=ISO-8859-1") == "Größe"
    assert document_text(b'{"a": 1}', "x", "application/json") == '{"a": 1}'
    assert document_text(b"<p>One</p><p>Two", "x.html") == "One\n\nTwo"
    words = docx("<w:p><w:r><w:t>One </w:t></w:r><w:r><w:t>line</w:t></w:r></w:p><w:p><w:r><w:t>Two</w:t></w:r></w:p>")
    assert document_text(words, "a.docx") == "One line\nTwo"
    for data, name in ((b"\0\1\2\0", "a.bin"), (b"no zip", "a.docx"), (b"%PDF-1.7 broken", "a.pdf")):
        with pytest.raises(UnreadableDocument):
            document_text(data, name)


def test_pages_become_readable_text() -> None:
    page = """<html><head><title> A  page </title><style>p {}</style></head><body>
    <nav><a href="/home">Home</a></nav><h1>Head</h1><p>Some <b>bold</b>
    text &amp; more<br>next</p><script>var x = "<p>no</p>";</script><ul><li>one<li>two</ul>
    <table><tr><td>a</td><td>b</td></tr></table><pre>  kept
    as it is</pre><a href="javascript:x()">no link</a></body></html>"""
    text = html_text(page, "http://h.example/dir/page")
    assert text.startswith("A page\n\nHome (http://h.example/home)")
    assert "# Head" in text
    assert "Some bold text & more\nnext" in text
    assert "- one\n- two" in text
    assert "| a | b" in text
    assert "as it is" in text
    assert "var x" not in text
    assert "p {}" not in text
    assert "javascript" not in text


HEAD = "<!doctype html><html><head><meta charset=utf-8><title>T</title><style>p {}</style><link rel=x>"
UNSEEN = "<noscript><img src=x>no</noscript><template><p>no</p></template><script>no()</script>"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (f"{HEAD}{UNSEEN}<body class=x><p>Hello</p><p>you</p></body></html>", "T\n\nHello\n\nyou"),
        (f"{HEAD}{UNSEEN}<p>Hello<p>you", "T\n\nHello\n\nyou"),
        (f"{HEAD}{UNSEEN} Hello <b>you</b>", "T\n\nHello you"),
        (f"{HEAD}<noscript>no<body><p>Hello", "T\n\nHello"),
        (f"{HEAD}<svg><path>no</path></svg><p>Hello", "T\n\nHello"),
        (f"{HEAD}{UNSEEN}</head><body><h1>Hello</h1>", "T\n\n# Hello"),
        (f"{HEAD}{UNSEEN}", "T"),
    ],
)
def test_a_head_may_end_without_its_tag(page, text) -> None:
    assert html_text(page) == text


@given(st.text(alphabet="<>/apbr \"'=&;!-hd1scrit\n", max_size=200))
def test_any_markup_gives_some_text(markup) -> None:
    assert isinstance(html_text(markup), str)


def test_programs_side_by_side_are_each_their_own(make_context, tmp_path) -> None:
    space = Workspace(tmp_path / "work")
    try:
        box = Sandbox(space.folder, Bounds(timeout_s=60))
    except NotConfined as error:
        pytest.skip(str(error))
    watch = Watch(make_context({}), None)
    kit = Kit(watch=watch, workspace=space, sandbox=box, providers={}, redact=Redactor())
    (mine,), (others,) = (build_tools(Tools(python=True), kit) for _ in range(2))
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit((mine, others)[n % 2].call, code=f"print('program', {n})") for n in range(4)]
        assert [call.result() for call in calls] == [f"program {n}" for n in range(4)]
    assert space.listing() == []


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
    for path, said in (("/s", "answered 500"), ("/other", "not what its configuration says")):
        provider = SearchProvider(url=site.url(path), params={"q": "{query}"})
        with pytest.raises(WebRefused, match=said):
            search("x", 3, provider, Redactor(), "p")
    with pytest.raises(BadRequest, match=r"one of them must contain \{query\}"):
        check_provider(SearchProvider(url=site.url(), params={"q": "x"}), "p")
    with pytest.raises(BadRequest, match=r"p.url: an http or https address"):
        check_provider(SearchProvider(url="search", params={"q": "{query}"}), "p")


def test_secrets_are_hidden_wherever_they_stand(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "key-from-env-1")
    redact = task_redactor()
    for secret in ("Basic dXNlcjpwdw==", "abc"):
        redact.learn(secret)
    assert redact("a key-from-env-1 b dXNlcjpwdw== abc") == "a [hidden] b [hidden] abc"
    assert redact("http://me:pw@host/x") == "http://[hidden]@host/x"
    assert redact("Authorization: Bearer abcdef0123456789abcdef") == "Authorization: Bearer [hidden]"
    assert redact("half a \ud83d pair") == "half a \ufffd pair"
    for answer in ("a bearer of good tidings", "Bearer bonds", "the basic principles of token economics"):
        assert redact(answer) == answer
    assert redact.deep({"key-from-env-1": ["x key-from-env-1", 3, None]}) == {"[hidden]": ["x [hidden]", 3, None]}


@pytest.mark.parametrize(
    ("names", "secret"),
    [
        ("TOKEN GITHUB_TOKEN TOKEN_2 accessToken X-Auth-Token Private-Token", True),
        ("API_KEY OPENAI_APIKEY X-Api-Key apiKey KEY SIGNING_KEY KEY_ID AWS_SECRET_ACCESS_KEY API_KEYS", True),
        ("PASSWORD PGPASSWORD DB_PASSWD DB_PASS MYSQL_PWD SSH_PASSPHRASE X-Auth GITHUB_PAT SESSION_JWT", True),
        ("Authorization Proxy-Authorization Cookie Set-Cookie CREDENTIALS CLIENT_SECRET secrets", True),
        ("PWD OLDPWD ROOT DOCS_DIR X-Team MAX_TOKENS TOKENIZERS_PARALLELISM KEYBOARD MONKEY", False),
        ("SSH_AUTH_SOCK AUTHOR SECRETARY COMPASS PATH TOKEN_FILE POSTGRES_PASSWORD_FILE KEY_PATH SECRETS_DIR", False),
    ],
)
def test_names_tell_what_is_secret(names, secret) -> None:
    for number, name in enumerate(names.split()):
        redact = Redactor(prose=True)
        redact.learn_named({name: f"its-value-{number}"})
        assert (redact(f"x its-value-{number}"), name) == ("x [hidden]" if secret else f"x its-value-{number}", name)


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
