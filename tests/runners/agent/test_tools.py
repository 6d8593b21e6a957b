"""The agents' tools one by one: files, documents, pages, search; and the helpers that read what models write."""

from __future__ import annotations

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.redaction import Redactor
from runners.agent.command import Bounds, NotConfined
from runners.agent.config import Tools
from runners.agent.documents import UnreadableDocument, document_text
from runners.agent.html_text import html_text
from runners.agent.sandbox import Sandbox
from runners.agent.secrets import task_redactor
from runners.agent.tools import Kit, build_tools
from runners.agent.watch import Watch
from runners.agent.workspace import PathRefused, Workspace


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
